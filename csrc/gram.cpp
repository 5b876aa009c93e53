#include "gram.h"

#include <torch/library.h>

#include "common/checks.h"

namespace deepsim {

StyleDistance style_distance_from(const char* function, std::string_view name) {
  if (name == "l2") return StyleDistance::l2;
  if (name == "l1") return StyleDistance::l1;
  TORCH_CHECK_VALUE(false, function, ": distance must be one of 'l2', 'l1', got '", name, "'");
}

void check_features(const char* function, const at::Tensor& features) {
  check_floating(function, "features", features, 3);
  TORCH_CHECK_VALUE(features.numel() > 0, function, ": features must not be empty, got shape ", features.sizes());
}

void check_target(const char* function, const at::Tensor& target, const at::Tensor& features) {
  const int64_t batch = target.dim() == 3 && target.size(0) == 1 ? 1 : features.size(0), channels = features.size(1);
  check_like(function, "target", target, compute_type(features.scalar_type()), features.device(), {batch, channels, channels});
}

void check_grad_gram(const char* function, const at::Tensor& grad_gram, const at::Tensor& features) {
  const int64_t batch = features.size(0), channels = features.size(1);
  check_like(function, "grad_gram", grad_gram, compute_type(features.scalar_type()), features.device(),
             {batch, channels, channels});
}

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // features [B, C, N] -> scale * F F^T, [B, C, C], float32 for 16-bit features.
  m.def("gram_matrix(Tensor features, float scale) -> Tensor");
  // scale * (grad_gram + grad_gram^T) F, in the dtype and memory format of features.
  m.def("gram_matrix_backward(Tensor grad_gram, Tensor features, float scale) -> Tensor");
  // residual = scale * F F^T - target, [B, C, C]; loss = factor * sum of residual^2 (l2) or |residual| (l1).
  m.def(
      "style_loss(Tensor features, Tensor target, float scale, float factor, str distance)"
      " -> (Tensor loss, Tensor residual)");
}

}  // namespace deepsim
