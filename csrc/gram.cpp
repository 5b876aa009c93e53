#include "gram.h"

#include <torch/library.h>

#include "common/checks.h"
#include "common/layout.h"

namespace deepsim {

namespace {

StyleDistance style_distance_from(const char* function, std::string_view name) {
  if (name == "l2") return StyleDistance::l2;
  if (name == "l1") return StyleDistance::l1;
  if (name == "frobenius") return StyleDistance::frobenius;
  TORCH_CHECK_VALUE(false, function, ": distance must be one of 'l2', 'l1', 'frobenius', got '", name, "'");
}

double style_factor(const char* function, const at::Tensor& features, std::string_view reduction) {
  const double b = double(features.size(0)), c = double(features.size(1)), n = double(features.size(2));
  if (reduction == "mean") return 1 / (b * c * c);
  if (reduction == "sum") return 1;
  if (reduction == "gatys") return 1 / (4 * c * c * n * n);
  TORCH_CHECK_VALUE(false, function, ": reduction must be one of 'mean', 'sum', 'gatys', got '", reduction, "'");
}

}  // namespace

double gram_scale(const char* function, const at::Tensor& features, std::string_view normalize, double divisor) {
  const double b = double(features.size(0)), c = double(features.size(1)), n = double(features.size(2));
  if (normalize == "none") return 1 / divisor;
  if (normalize == "hw") return 1 / (divisor * n);
  if (normalize == "chw") return 1 / (divisor * c * n);
  if (normalize == "bchw") return 1 / (divisor * b * c * n);
  TORCH_CHECK_VALUE(false, function, ": normalize must be one of 'none', 'hw', 'chw', 'bchw', got '", normalize, "'");
}

StyleLayers style_layers(const char* function, at::TensorList features, const StyleOptions& options) {
  TORCH_CHECK_VALUE(!features.empty() && features.size() <= kMostLayers, function, ": features must be 1 to ", kMostLayers,
                    " layers, got ", features.size());
  TORCH_CHECK_VALUE(options.weights.size() == features.size(), function, ": weights must be one number for each of ", features.size(),
                    " layers, got ", options.weights.size());
  StyleLayers result{{}, style_distance_from(function, options.distance)};
  int64_t first = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    const at::Tensor& f = features[i];
    check_features(function, f);
    TORCH_CHECK_VALUE(f.scalar_type() == features[0].scalar_type() && f.device() == features[0].device(), function,
                      ": features must have one dtype and device, got ", f.scalar_type(), " on ", f.device(), " beside ",
                      features[0].scalar_type(), " on ", features[0].device());
    result.layers.push_back({with_adjacent_axis(f), gram_scale(function, f, options.normalize, options.divisor),
                             style_factor(function, f, options.reduction), options.weights[i], first});
    first += result.layers.back().residual_size();
  }
  return result;
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

void check_targets(const char* function, at::TensorList target, at::TensorList features) {
  TORCH_CHECK_VALUE(target.size() == features.size(), function, ": target must be one matrix for each of ", features.size(),
                    " layers, got ", target.size());
  for (size_t i = 0; i < target.size(); ++i) check_target(function, target[i], features[i]);
}

void check_style_gradient(const char* function, const at::Tensor& grad_loss, const at::Tensor& losses, const at::Tensor& residuals,
                          const c10::List<bool>& wanted, const StyleLayers& layers) {
  const at::Tensor& f = layers.layers[0].features;
  const at::ScalarType type = compute_type(f.scalar_type());
  const int64_t count = int64_t(layers.layers.size());
  check_like(function, "grad_loss", grad_loss, type, f.device(), {});
  check_like(function, "losses", losses, type, f.device(), {count});
  check_like(function, "residuals", residuals, type, f.device(), {layers.residual_size()});
  TORCH_CHECK_VALUE(int64_t(wanted.size()) == count, function, ": wanted must be one bool for each of ", count, " layers, got ",
                    wanted.size());
}

// Sizes are not turned into scales before they get here: torch.compile would take a float that depends on sizes for a constant.
TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // features [B, C, N] -> scale * F F^T, [B, C, C], float32 for 16-bit features.
  m.def("gram_matrix(Tensor features, str normalize, float divisor) -> Tensor");
  // scale * (grad_gram + grad_gram^T) F, in the dtype and memory format of features.
  m.def("gram_matrix_backward(Tensor grad_gram, Tensor features, str normalize, float divisor) -> Tensor");
  // Of every layer residual = scale * F F^T - target, [B, C, C], all of them one after the other in `residuals`, and losses[i] =
  // factor * sum of residual^2 (l2) or |residual| (l1), or the root of the sum of squares times factor (frobenius). loss = sum of
  // weights * losses. Features of one dtype.
  m.def(
      "style_loss(Tensor[] features, Tensor[] target, float[] weights, str normalize, float divisor, str reduction, str distance)"
      " -> (Tensor loss, Tensor losses, Tensor residuals)");
  // Gradients of grad_loss * loss by the features of the wanted layers; of others, empty tensors.
  m.def(
      "style_loss_backward(Tensor grad_loss, Tensor losses, Tensor residuals, Tensor[] features, bool[] wanted, float[] weights,"
      " str normalize, float divisor, str reduction, str distance) -> Tensor[]");
}

}  // namespace deepsim
