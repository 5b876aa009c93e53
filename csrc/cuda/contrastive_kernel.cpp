// The contrastive loss of given pairs on CUDA, the torch side.
#include <torch/library.h>

#include "given_rows_kernel.h"

namespace deepsim::cuda {
namespace {

GivenLoss contrastive_loss(const at::Tensor& x1, const at::Tensor& x2, const at::Tensor& y, double margin, std::string_view reduction) {
  constexpr const char* function = "contrastive_loss";
  check_given(function, {{"x1", x1}, {"x2", x2}});
  check_contrast(function, y, x1);
  const std::array sets{with_adjacent_columns(x1), with_adjacent_columns(x2)};
  const at::Tensor similar = y.contiguous();
  return given_loss(sets, 1, Distance::euclidean, reduction_from(function, reduction),
                    [&](const GivenRows& rows, const GivenLosses& out, void* stream) {
                      contrastive_losses(rows, similar.const_data_ptr(), margin, out, stream);
                    });
}

std::tuple<at::Tensor, at::Tensor> contrastive_loss_backward(const at::Tensor& grad_loss, const at::Tensor& distances,
                                                             const at::Tensor& slopes, const at::Tensor& scale, const at::Tensor& x1,
                                                             const at::Tensor& x2, const at::Tensor&, double,
                                                             std::string_view reduction) {
  constexpr const char* function = "contrastive_loss_backward";
  check_given_backward(function, {{"x1", x1}, {"x2", x2}}, 1, grad_loss, distances, slopes, scale, reduction_from(function, reduction));
  const std::array sets{with_adjacent_columns(x1), with_adjacent_columns(x2)};
  return std::tuple_cat(given_gradient(sets, 1, Distance::euclidean, grad_loss, distances, slopes, scale));
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) {
  m.impl("contrastive_loss", contrastive_loss);
  m.impl("contrastive_loss_backward", contrastive_loss_backward);
}

}  // namespace deepsim::cuda
