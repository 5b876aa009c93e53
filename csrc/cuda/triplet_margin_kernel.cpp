// The triplet loss of given triplets on CUDA, the torch side.
#include <torch/library.h>

#include "given_rows_kernel.h"

namespace deepsim::cuda {
namespace {

GivenLoss triplet_margin_loss(const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative, double margin, bool swap,
                              bool soft, std::string_view distance, std::string_view reduction) {
  constexpr const char* function = "triplet_margin_loss";
  check_given(function, {{"anchor", anchor}, {"positive", positive}, {"negative", negative}});
  const GivenTriplet formula{{margin, soft}, swap};
  const std::array sets{with_adjacent_columns(anchor), with_adjacent_columns(positive), with_adjacent_columns(negative)};
  return given_loss(
      sets, triplet_pairs(swap), distance_from(function, distance), reduction_from(function, reduction),
      [&](const GivenRows& rows, const GivenLosses& out, void* stream) { triplet_losses(rows, formula, out, stream); });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> triplet_margin_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& distances, const at::Tensor& slopes, const at::Tensor& scale, const at::Tensor& anchor,
    const at::Tensor& positive, const at::Tensor& negative, double, bool swap, bool, std::string_view distance,
    std::string_view reduction) {
  constexpr const char* function = "triplet_margin_loss_backward";
  const Distance d = distance_from(function, distance);
  check_given_backward(function, {{"anchor", anchor}, {"positive", positive}, {"negative", negative}}, triplet_pairs(swap), grad_loss,
                       distances, slopes, scale, reduction_from(function, reduction));
  const std::array sets{with_adjacent_columns(anchor), with_adjacent_columns(positive), with_adjacent_columns(negative)};
  return std::tuple_cat(given_gradient(sets, triplet_pairs(swap), d, grad_loss, distances, slopes, scale));
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) {
  m.impl("triplet_margin_loss", triplet_margin_loss);
  m.impl("triplet_margin_loss_backward", triplet_margin_loss_backward);
}

}  // namespace deepsim::cuda
