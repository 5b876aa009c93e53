// The triplet loss of given triplets on the CPU.
#include <torch/library.h>

#include "given_rows.h"

namespace deepsim::cpu {
namespace {

GivenLoss triplet_margin_loss(const at::Tensor& anchor, const at::Tensor& positive, const at::Tensor& negative, double margin, bool swap,
                              bool soft, std::string_view distance, std::string_view reduction) {
  constexpr const char* function = "triplet_margin_loss";
  check_given(function, {{"anchor", anchor}, {"positive", positive}, {"negative", negative}});
  const Distance d = distance_from(function, distance);
  const Reduction r = reduction_from(function, reduction);
  const std::array sets{with_adjacent_columns(anchor), with_adjacent_columns(positive), with_adjacent_columns(negative)};
  return dispatch(anchor.scalar_type(), [&](const auto& kernels) {
    return given_loss(kernels, sets, triplet_pairs(swap), d, GivenTriplet{{margin, soft}, swap}, r);
  });
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
  return dispatch(anchor.scalar_type(), [&](const auto& kernels) {
    return std::tuple_cat(given_gradient(kernels, sets, triplet_pairs(swap), d, grad_loss, distances, slopes, scale));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) {
  m.impl("triplet_margin_loss", triplet_margin_loss);
  m.impl("triplet_margin_loss_backward", triplet_margin_loss_backward);
}

}  // namespace deepsim::cpu
