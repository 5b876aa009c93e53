// Anchors that bring lists of their positives' distances, against a block of rows: what ops over such lists check and agree on.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace deepsim {

// Throws unless embeddings [N, D], labels [N], a block of rows [M, D] with labels [M], and lists of positives fit together:
// begin int64 [N + 1] ascends from 0 to P, the distances of anchor a's positives stand at [begin[a], begin[a + 1]) of positives [P]. `center`
// is float64 [D]. Reads `begin`, which must be on the CPU.
void check_given_lists(const char* function, const at::Tensor& embeddings, const at::Tensor& labels, const at::Tensor& ref_embeddings,
                       const at::Tensor& ref_labels, const at::Tensor& begin, const at::Tensor& positives,
                       const std::optional<at::Tensor>& center);

}  // namespace deepsim
