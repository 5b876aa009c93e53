// Gram matrix and style loss on CUDA, the torch side: memory and what the launches in gram.cu are to work on.
#include "../gram.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <tuple>

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

// Sums of products and of the loss, and what the result is to be.
struct Target {
  const at::Tensor* matrix = nullptr;  // null: the Gram matrix itself
  at::Tensor* loss = nullptr;
  double factor = 0;
  bool squared = false;
};

at::Tensor gram_minus(const at::Tensor& features, double scale, const Target& target) {
  const c10::DeviceGuard guard(features.device());
  const at::Tensor f = with_adjacent_axis(features);
  const int64_t batch = f.size(0), channels = f.size(1);
  const auto compute = f.options().dtype(compute_type(f.scalar_type()));
  at::Tensor matrix = at::empty({batch, channels, channels}, compute);
  GramSpace space = {};
  space.slices = gram_slices(batch, channels, f.size(2));
  const at::Tensor sums = at::empty({batch * space.slices * gram_tiles(channels) * kGramTile * kGramTile}, compute);
  space.sums = sums.mutable_data_ptr();
  GramResult out = {};
  out.matrix = matrix.mutable_data_ptr();
  out.scale = scale;
  at::Tensor goal, losses, finished;
  if (target.matrix) {
    goal = target.matrix->contiguous();
    losses = at::empty({gram_reduce_blocks(batch, channels)}, f.options().dtype(at::kDouble));
    finished = at::zeros({1}, f.options().dtype(at::kInt));
    *target.loss = at::empty({}, compute);
    space.losses = losses.mutable_data_ptr<double>();
    space.finished = reinterpret_cast<uint32_t*>(finished.mutable_data_ptr<int32_t>());
    out.target = goal.const_data_ptr();
    out.target_stride = goal.size(0) == 1 ? 0 : channels * channels;
    out.loss = target.loss->mutable_data_ptr();
    out.factor = target.factor;
    out.squared = target.squared;
  }
  gram(storage_of(f.scalar_type()), tf32_allowed(f), features_of(f), space, out, current_stream(f));
  return matrix;
}

at::Tensor gram_matrix(const at::Tensor& features, std::string_view normalize, double divisor) {
  constexpr const char* function = "gram_matrix";
  check_features(function, features);
  return gram_minus(features, gram_scale(function, features, normalize, divisor), {});
}

std::tuple<at::Tensor, at::Tensor> style_loss(const at::Tensor& features, const at::Tensor& target, std::string_view normalize,
                                              double divisor, std::string_view reduction, std::string_view distance) {
  constexpr const char* function = "style_loss";
  check_features(function, features);
  check_target(function, target, features);
  const double scale = gram_scale(function, features, normalize, divisor);
  at::Tensor loss;
  const Target wanted{&target, &loss, style_factor(function, features, reduction),
                      style_distance_from(function, distance) == StyleDistance::l2};
  at::Tensor residual = gram_minus(features, scale, wanted);
  return {loss, residual};
}

at::Tensor gram_matrix_backward(const at::Tensor& grad_gram, const at::Tensor& features, std::string_view normalize,
                                double divisor) {
  constexpr const char* function = "gram_matrix_backward";
  check_features(function, features);
  check_grad_gram(function, grad_gram, features);
  const double scale = gram_scale(function, features, normalize, divisor);
  const c10::DeviceGuard guard(features.device());
  const at::Tensor f = with_adjacent_axis(features), g = grad_gram.contiguous();
  at::Tensor grad = at::empty_like(features), symmetric = at::empty_like(g);
  at::Tensor out = with_adjacent_axis(grad);
  gram_gradient(storage_of(f.scalar_type()), tf32_allowed(f), features_of(f), g.const_data_ptr(), scale,
                symmetric.mutable_data_ptr(), features_of(out), current_stream(f));
  if (!out.is_same(grad)) grad.copy_(out);
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) {
  m.impl("gram_matrix", gram_matrix);
  m.impl("gram_matrix_backward", gram_matrix_backward);
  m.impl("style_loss", style_loss);
}

}  // namespace deepsim::cuda
