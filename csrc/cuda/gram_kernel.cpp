// Gram matrix and style loss on CUDA, the torch side: memory and what the launches in gram.cu are to work on.
#include "../gram.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "../common/layout.h"
#include "backend.h"
#include "gram.h"
#include "storage_of.h"

namespace deepsim::cuda {
namespace {

// Strides of an axis of size 1 say nothing: they are set to what the kernels expect.
Features features_of(const at::Tensor& f) {
  const bool positions = f.stride(2) == 1 || f.size(2) == 1;
  return {f.const_data_ptr(), f.size(0), f.size(1), f.size(2), f.stride(0), positions ? f.stride(1) : 1, positions ? 1 : f.stride(2)};
}

static_assert(kMostGramLayers == int(kMostLayers));

// Makes room for the sums of what is planned and launches it.
void run_gram(Gram& work, const at::Tensor& f) {
  plan_gram(storage_of(f.scalar_type()), work);
  const auto compute = f.options().dtype(compute_type(f.scalar_type()));
  const at::Tensor sums = at::empty({work.sum_blocks * kGramTile * kGramTile}, compute);
  at::Tensor partial_losses, finished;
  work.sums = sums.mutable_data_ptr();
  if (work.loss) {
    partial_losses = at::empty({work.reduce_blocks}, f.options().dtype(at::kDouble));
    finished = at::zeros({1}, f.options().dtype(at::kInt));
    work.partial_losses = partial_losses.mutable_data_ptr<double>();
    work.finished = reinterpret_cast<uint32_t*>(finished.mutable_data_ptr<int32_t>());
  }
  gram(storage_of(f.scalar_type()), tf32_allowed(f), work, current_stream(f));
}

at::Tensor gram_matrix(const at::Tensor& features, std::string_view normalize, double divisor) {
  constexpr const char* function = "gram_matrix";
  check_features(function, features);
  const double scale = gram_scale(function, features, normalize, divisor);
  const c10::DeviceGuard guard(features.device());
  const at::Tensor f = with_adjacent_axis(features);
  at::Tensor matrix = at::empty({f.size(0), f.size(1), f.size(1)}, f.options().dtype(compute_type(f.scalar_type())));
  Gram work = {};
  work.count = 1;
  work.layer[0].features = features_of(f);
  work.layer[0].matrix = matrix.mutable_data_ptr();
  work.layer[0].scale = scale;
  run_gram(work, f);
  return matrix;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> style_loss(at::TensorList features, at::TensorList target, at::ArrayRef<double> weights,
                                                          std::string_view normalize, double divisor, std::string_view reduction,
                                                          std::string_view distance) {
  constexpr const char* function = "style_loss";
  const StyleLayers layers = style_layers(function, features, {weights, normalize, divisor, reduction, distance});
  check_targets(function, target, features);
  const c10::DeviceGuard guard(features[0].device());
  const auto compute = features[0].options().dtype(compute_type(features[0].scalar_type()));
  at::Tensor loss = at::empty({}, compute), losses = at::empty({int64_t(features.size())}, compute);
  at::Tensor residuals = at::empty({layers.residual_size()}, compute);
  std::vector<at::Tensor> targets;
  Gram work = {};
  for (const StyleLayer& layer : layers.layers) {
    targets.push_back(target[targets.size()].contiguous());
    const at::Tensor& t = targets.back();
    GramLayer& to = work.layer[work.count++];
    to.features = features_of(layer.features);
    to.matrix = static_cast<char*>(residuals.mutable_data_ptr()) + layer.first * residuals.element_size();
    to.target = t.const_data_ptr();
    to.target_stride = t.size(0) == 1 ? 0 : t.size(1) * t.size(1);
    to.scale = layer.scale;
    to.factor = layer.factor;
    to.weight = layer.weight;
  }
  work.distance = layers.distance;
  work.loss = loss.mutable_data_ptr();
  work.losses = losses.mutable_data_ptr();
  run_gram(work, layers.layers[0].features);
  return {loss, losses, residuals};
}

// The gradient of one layer on its way: what the launch writes, and the tensor in the format of the features that it is for.
struct LayerGradient {
  at::Tensor grad, out, symmetric, row_scale;

  LayerGradient(const at::Tensor& features, const at::Tensor& f, GramGradientLayer& layer)
      : grad(at::empty_like(features)),
        out(with_adjacent_axis(grad)),
        symmetric(at::empty({f.size(0), f.size(1), f.size(1)}, f.options().dtype(compute_type(f.scalar_type())))),
        row_scale(at::empty({f.size(0), f.size(1)}, f.options().dtype(at::kFloat))) {
    layer.features = features_of(f);
    layer.grad = features_of(out);
    layer.symmetric = symmetric.mutable_data_ptr();
    layer.row_scale = row_scale.mutable_data_ptr<float>();
  }

  at::Tensor finish() const {
    if (!out.is_same(grad)) grad.copy_(out);
    return grad;
  }
};

at::Tensor gram_matrix_backward(const at::Tensor& grad_gram, const at::Tensor& features, std::string_view normalize,
                                double divisor) {
  constexpr const char* function = "gram_matrix_backward";
  check_features(function, features);
  check_grad_gram(function, grad_gram, features);
  const double scale = gram_scale(function, features, normalize, divisor);
  const c10::DeviceGuard guard(features.device());
  const at::Tensor f = with_adjacent_axis(features), g = grad_gram.contiguous();
  GramGradient work = {};
  work.count = 1;
  const LayerGradient gradient(features, f, work.layer[0]);
  work.layer[0].g = g.const_data_ptr();
  work.layer[0].scale = scale;
  gram_gradient(storage_of(f.scalar_type()), tf32_allowed(f), work, current_stream(f));
  return gradient.finish();
}

std::vector<at::Tensor> style_loss_backward(const at::Tensor& grad_loss, const at::Tensor& losses, const at::Tensor& residuals,
                                            at::TensorList features, const c10::List<bool>& wanted, at::ArrayRef<double> weights,
                                            std::string_view normalize, double divisor, std::string_view reduction,
                                            std::string_view distance) {
  constexpr const char* function = "style_loss_backward";
  const StyleLayers layers = style_layers(function, features, {weights, normalize, divisor, reduction, distance});
  check_style_gradient(function, grad_loss, losses, residuals, wanted, layers);
  const c10::DeviceGuard guard(features[0].device());
  const at::Tensor loss_of = losses.contiguous(), residual_of = residuals.contiguous();
  const auto element = [](const at::Tensor& t, int64_t i) { return static_cast<const char*>(t.const_data_ptr()) + i * t.element_size(); };
  GramGradient work = {};
  work.distance = layers.distance;
  work.grad_loss = grad_loss.const_data_ptr();
  std::vector<LayerGradient> gradients;
  for (size_t i = 0; i < features.size(); ++i) {
    if (!wanted[i]) continue;
    const StyleLayer& layer = layers.layers[i];
    GramGradientLayer& to = work.layer[work.count++];
    gradients.emplace_back(features[i], layer.features, to);
    to.g = element(residual_of, layer.first);
    to.loss = element(loss_of, int64_t(i));
    to.scale = layer.weight * layer.factor * layer.scale * (layers.distance == StyleDistance::l2 ? 2 : 1);
  }
  const at::Tensor& f = layers.layers[0].features;
  if (work.count > 0) gram_gradient(storage_of(f.scalar_type()), tf32_allowed(f), work, current_stream(f));
  std::vector<at::Tensor> result;
  auto next = gradients.begin();
  for (size_t i = 0; i < features.size(); ++i) result.push_back(wanted[i] ? (next++)->finish() : at::empty({0}, features[i].options()));
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) {
  m.impl("gram_matrix", gram_matrix);
  m.impl("gram_matrix_backward", gram_matrix_backward);
  m.impl("style_loss", style_loss);
  m.impl("style_loss_backward", style_loss_backward);
}

}  // namespace deepsim::cuda
