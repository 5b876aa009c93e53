// Batch-hard mining and triplet loss: what every backend's kernel checks and agrees on.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "common/distance.h"
#include "common/triplet_loss.h"

namespace deepsim {

// Throw where `function` got something else than one of the names.
Distance distance_from(const char* function, std::string_view name);
Reduction reduction_from(const char* function, std::string_view name);

// Throws unless x is a matrix of embeddings, one a row.
void check_rows(const char* function, const char* argument, const at::Tensor& x);

// Throw unless embeddings [N, D] and labels [N], and the reference set likewise if there is one, fit together. These guard
// memory: the Python wrappers check the same with friendlier words, but torch.ops can be called by anyone.
void check_batch(const char* function, const at::Tensor& embeddings, const at::Tensor& labels,
                 const std::optional<at::Tensor>& ref_embeddings, const std::optional<at::Tensor>& ref_labels);

// Throws unless center [D], float64, is something that the embeddings can be shifted by.
void check_center(const char* function, const at::Tensor& center, const at::Tensor& embeddings);

// The same for the arguments of the backward op. (Indices are checked by the kernels, which read them anyway.)
void check_backward(const at::Tensor& grad_loss, const at::Tensor& embeddings, const std::optional<at::Tensor>& ref_embeddings,
                    const at::Tensor& positives, const at::Tensor& negatives, const at::Tensor& d_ap, const at::Tensor& d_an,
                    Reduction reduction);

}  // namespace deepsim
