// Argument checks that the ops share.
#pragma once

#include <ATen/core/Tensor.h>

namespace deepsim {

inline bool is_floating_storage(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

// The dtype of sums over `storage`: losses, distances and Gram matrices come in it.
inline at::ScalarType compute_type(at::ScalarType storage) { return storage == at::kDouble ? at::kDouble : at::kFloat; }

inline void check_floating(const char* function, const char* argument, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK_TYPE(is_floating_storage(t.scalar_type()), function, ": ", argument,
                   " must be float32, float64, bfloat16 or float16, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == dim, function, ": ", argument, " must have ", dim, " dimensions, got shape ", t.sizes());
}

inline void check_like(const char* function, const char* argument, const at::Tensor& t, at::ScalarType type, at::Device device,
                       at::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(t.scalar_type() == type, function, ": ", argument, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == device, function, ": ", argument, " must be on ", device, ", got ", t.device());
  TORCH_CHECK_VALUE(t.sizes() == sizes, function, ": ", argument, " must be of shape ", sizes, ", got ", t.sizes());
}

}  // namespace deepsim
