#include "gram.h"

#include <torch/library.h>

#include "common/checks.h"

namespace deepsim {

StyleDistance style_distance_from(const char* function, std::string_view name) {
  if (name == "l2") return StyleDistance::l2;
  if (name == "l1") return StyleDistance::l1;
  TORCH_CHECK_VALUE(false, function, ": distance must be one of 'l2', 'l1', got '", name, "'");
}

double gram_scale(const char* function, const at::Tensor& features, std::string_view normalize, double divisor) {
  const double b = double(features.size(0)), c = double(features.size(1)), n = double(features.size(2));
  if (normalize == "none") return 1 / divisor;
  if (normalize == "hw") return 1 / (divisor * n);
  if (normalize == "chw") return 1 / (divisor * c * n);
  if (normalize == "bchw") return 1 / (divisor * b * c * n);
  TORCH_CHECK_VALUE(false, function, ": normalize must be one of 'none', 'hw', 'chw', 'bchw', got '", normalize, "'");
}

double style_factor(const char* function, const at::Tensor& features, std::string_view reduction) {
  const double b = double(features.size(0)), c = double(features.size(1)), n = double(features.size(2));
  if (reduction == "mean") return 1 / (b * c * c);
  if (reduction == "sum") return 1;
  if (reduction == "gatys") return 1 / (4 * c * c * n * n);
  TORCH_CHECK_VALUE(false, function, ": reduction must be one of 'mean', 'sum', 'gatys', got '", reduction, "'");
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

// Sizes are not turned into scales before they get here: torch.compile would take a float that depends on sizes for a constant.
TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // features [B, C, N] -> scale * F F^T, [B, C, C], float32 for 16-bit features.
  m.def("gram_matrix(Tensor features, str normalize, float divisor) -> Tensor");
  // scale * (grad_gram + grad_gram^T) F, in the dtype and memory format of features.
  m.def("gram_matrix_backward(Tensor grad_gram, Tensor features, str normalize, float divisor) -> Tensor");
  // residual = scale * F F^T - target, [B, C, C]; loss = factor * sum of residual^2 (l2) or |residual| (l1).
  m.def(
      "style_loss(Tensor features, Tensor target, str normalize, float divisor, str reduction, str distance)"
      " -> (Tensor loss, Tensor residual)");
}

}  // namespace deepsim
