// Given pairs of rows: what the ops check.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "common/distance.h"

namespace deepsim {

// Throws unless embeddings [N, D], ref_embeddings [M, D] and int64 rows, ref_rows [T] fit together; what the indices are is not looked at.
Distance check_pairs(const char* function, const at::Tensor& embeddings, const at::Tensor& ref_embeddings, const at::Tensor& rows,
                     const at::Tensor& ref_rows, std::string_view distance);

// Throws unless weights and distances [T], in the type of the arithmetic, are of as many pairs.
void check_pair_weights(const char* function, const at::Tensor& weights, const at::Tensor& distances, const at::Tensor& embeddings,
                        const at::Tensor& rows);

}  // namespace deepsim
