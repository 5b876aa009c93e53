// The contrastive loss of given pairs on the CPU.
#include <torch/library.h>

#include "given_rows.h"

namespace deepsim::cpu {
namespace {

GivenLoss contrastive_loss(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& y, double margin, std::string_view reduction) {
  constexpr const char* function = "contrastive_loss";
  check_given(function, {{"x1", x1}, {"x2", x2}});
  check_contrast(function, y, x1);
  const Reduction r = reduction_from(function, reduction);
  const std::array sets{with_adjacent_columns(x1), with_adjacent_columns(x2)};
  const at::Tensor similar = y.contiguous();
  return dispatch(x1.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    return given_loss(kernels, sets, 1, Distance::euclidean, GivenContrast<T>{similar.const_data_ptr<T>(), margin}, r);
  });
}

std::tuple<at::Tensor, at::Tensor> contrastive_loss_backward(const at::Tensor& grad_loss, const at::Tensor& distances,
                                                             const at::Tensor& slopes, const at::Tensor& scale, const at::Tensor& x1,
                                                             const at::Tensor& x2, const at::Tensor&, double,
                                                             std::string_view reduction) {
  constexpr const char* function = "contrastive_loss_backward";
  check_given_backward(function, {{"x1", x1}, {"x2", x2}}, 1, grad_loss, distances, slopes, scale, reduction_from(function, reduction));
  const std::array sets{with_adjacent_columns(x1), with_adjacent_columns(x2)};
  return dispatch(x1.scalar_type(), [&](const auto& kernels) {
    return std::tuple_cat(given_gradient(kernels, sets, 1, Distance::euclidean, grad_loss, distances, slopes, scale));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) {
  m.impl("contrastive_loss", contrastive_loss);
  m.impl("contrastive_loss_backward", contrastive_loss_backward);
}

}  // namespace deepsim::cpu
