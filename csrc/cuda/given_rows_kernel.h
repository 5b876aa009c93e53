// Losses of given pairs and triplets on CUDA, the torch side of both.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <tuple>

#include "../common/checks.h"
#include "../common/stage.h"
#include "../given_rows.h"
#include "backend.h"
#include "given_rows.h"
#include "owned_batch.h"

namespace deepsim::cuda {

// loss, distances, slopes, scale
using GivenLoss = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Their tensors have the elements of a row adjacent.
template <size_t kSets>
GivenRows given_rows(const std::array<at::Tensor, kSets>& sets, int pairs, Distance distance) {
  GivenRows g{storage_of(sets[0].scalar_type()), distance, {}, int(kSets), pairs};
  for (size_t s = 0; s < kSets; ++s) g.sets[s] = rows_of(sets[s]);
  return g;
}

// launch(rows, what to fill, stream)
template <size_t kSets, class Launch>
GivenLoss given_loss(const std::array<at::Tensor, kSets>& sets, int pairs, Distance distance, Reduction reduction, Launch launch) {
  const Stage stage("distances");
  const c10::DeviceGuard guard(sets[0].device());
  const int64_t rows = sets[0].size(0);
  const auto options = sets[0].options().dtype(compute_type(sets[0].scalar_type()));
  at::Tensor distances = at::empty({pairs, rows}, options), slopes = at::empty_like(distances), scale = at::empty({}, options);
  at::Tensor loss = reduction == Reduction::none ? at::empty({rows}, options) : at::empty({}, options);
  at::Tensor parts, finished;
  GivenLosses out{reduction, loss.mutable_data_ptr(), distances.mutable_data_ptr(), slopes.mutable_data_ptr(), scale.mutable_data_ptr()};
  if (reduction != Reduction::none) {
    parts = at::empty({loss_parts(rows) * int64_t(sizeof(LossPart))}, options.dtype(at::kByte));
    finished = at::zeros({1}, options.dtype(at::kInt));
    out.parts = reinterpret_cast<LossPart*>(parts.mutable_data_ptr<uint8_t>());
    out.finished = reinterpret_cast<uint32_t*>(finished.mutable_data_ptr<int32_t>());
  }
  launch(given_rows(sets, pairs, distance), out, current_stream(sets[0]));
  return {loss, distances, slopes, scale};
}

template <size_t kSets>
std::array<at::Tensor, kSets> given_gradient(const std::array<at::Tensor, kSets>& sets, int pairs, Distance distance,
                                             const at::Tensor& grad_loss, const at::Tensor& distances, const at::Tensor& slopes,
                                             const at::Tensor& scale) {
  const Stage stage("backward");
  const c10::DeviceGuard guard(sets[0].device());
  const at::Tensor incoming = grad_loss.contiguous(), d = distances.contiguous(), slope = slopes.contiguous();
  GivenGradient g{given_rows(sets, pairs, distance), d.const_data_ptr(),        slope.const_data_ptr(),
                  scale.const_data_ptr(),            incoming.const_data_ptr(), int64_t(grad_loss.dim() == 1),
                  {}};
  std::array<at::Tensor, kSets> grads;
  for (size_t s = 0; s < kSets; ++s) {
    grads[s] = at::empty(sets[s].sizes(), sets[s].options());
    g.grads[s] = grads[s].mutable_data_ptr();
  }
  given_gradient(g, current_stream(sets[0]));
  return grads;
}

}  // namespace deepsim::cuda
