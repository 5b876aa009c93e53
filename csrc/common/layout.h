// Tensors laid out as kernels of every backend read them: one axis adjacent in memory, copied only where none is.
#pragma once

#include <ATen/core/Tensor.h>

namespace deepsim {

// Embeddings [N, D] with the elements of a row adjacent.
inline at::Tensor with_adjacent_columns(const at::Tensor& x) { return x.size(1) == 1 || x.stride(1) == 1 ? x : x.contiguous(); }

// Features [B, C, N] with positions or channels adjacent.
inline at::Tensor with_adjacent_axis(const at::Tensor& features) {
  const bool positions = features.stride(2) == 1 || features.size(2) == 1;
  const bool channels = features.stride(1) == 1 || features.size(1) == 1;
  return positions || channels ? features : features.contiguous();
}

}  // namespace deepsim
