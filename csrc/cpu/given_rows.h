// Losses of given pairs and triplets on the CPU: a pass over the rows for the losses, and one for the gradients.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "../common/checks.h"
#include "../common/stage.h"
#include "../given_rows.h"
#include "capability.h"
#include "huge_pages.h"
#include "rows.h"

namespace deepsim::cpu {

// loss, distances, slopes, scale
using GivenLoss = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The first of the sets has the rows' number and dtype. Their tensors have the elements of a row adjacent.
template <size_t kSets>
GivenRows given_rows(const std::array<at::Tensor, kSets>& sets, int pairs, Distance distance) {
  GivenRows g{{}, int(kSets), pairs, distance};
  for (size_t s = 0; s < kSets; ++s) g.sets[s] = rows_of(sets[s]);
  return g;
}

// formula: one of common/given_rows.h. T is the type of the arithmetic.
template <class T, size_t kSets, class Formula>
GivenLoss given_loss(const Kernels<T>& kernels, const std::array<at::Tensor, kSets>& sets, int pairs, Distance distance,
                     const Formula& formula, Reduction reduction) {
  const Stage stage("distances");
  const GivenRows g = given_rows(sets, pairs, distance);
  const int64_t count = g.sets[0].count;
  const auto options = sets[0].options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor losses = at::empty({count}, options), distances = at::empty({pairs, count}, options), slopes = at::empty_like(distances);
  T *loss = losses.mutable_data_ptr<T>(), *out = distances.mutable_data_ptr<T>(), *slope_out = slopes.mutable_data_ptr<T>();
  const auto finish_row = [&](int64_t t, const double (&d)[kMostGivenPairs]) {
    double slope[kMostGivenPairs] = {}, sum = 0;
    for (int k = 0; k < pairs; ++k) sum += d[k];
    const bool finite = std::isfinite(sum);  // otherwise a margin may hide it
    const double own = formula(t, d, slope);
    loss[t] = finite ? T(own) : std::numeric_limits<T>::quiet_NaN();
    for (int k = 0; k < pairs; ++k) {
      out[k * count + t] = finite ? T(d[k]) : std::numeric_limits<T>::quiet_NaN();
      slope_out[k * count + t] = finite ? T(slope[k]) : std::numeric_limits<T>::quiet_NaN();
    }
  };
  at::parallel_for(0, count, row_grain(g.sets[0].depth), [&](int64_t begin, int64_t end) {
    constexpr int64_t kAtOnce = 64;
    double d[kAtOnce][kMostGivenPairs] = {};
    for (int64_t first = begin; first < end; first += kAtOnce) {
      const int64_t last = std::min(end, first + kAtOnce);
      kernels.given_distances(g, first, last, d[0]);
      for (int64_t t = first; t < last; ++t) finish_row(t, d[t - first]);
    }
  });

  at::Tensor scale = at::empty({}, options);
  *scale.mutable_data_ptr<T>() = 1;
  if (reduction == Reduction::none) return {losses, distances, slopes, scale};
  double sum = 0;
  int64_t active = 0;
  for (int64_t t = 0; t < count; ++t) sum += loss[t], active += loss[t] > 0;
  const int64_t divisor = reduction == Reduction::mean ? count : reduction == Reduction::mean_nonzero ? active : 1;
  if (divisor > 1) *scale.mutable_data_ptr<T>() = T(1) / T(divisor);
  at::Tensor result = at::empty({}, options);
  *result.mutable_data_ptr<T>() = T(sum / double(std::max<int64_t>(1, divisor)));
  return {result, distances, slopes, scale};
}

template <class T, size_t kSets>
std::array<at::Tensor, kSets> given_gradient(const Kernels<T>& kernels, const std::array<at::Tensor, kSets>& sets, int pairs,
                                             Distance distance, const at::Tensor& grad_loss, const at::Tensor& distances,
                                             const at::Tensor& slopes, const at::Tensor& scale) {
  const Stage stage("backward");
  const at::Tensor incoming = grad_loss.contiguous(), d = distances.contiguous(), slope = slopes.contiguous();
  GivenGradient<T> g{given_rows(sets, pairs, distance), d.const_data_ptr<T>(),           slope.const_data_ptr<T>(),
                     incoming.const_data_ptr<T>(),      int64_t(grad_loss.dim() == 1), *scale.const_data_ptr<T>(),
                     {}};
  std::array<at::Tensor, kSets> grads;
  for (size_t s = 0; s < kSets; ++s) {
    grads[s] = in_huge_pages(at::empty(sets[s].sizes(), sets[s].options()));
    g.grads[s] = grads[s].mutable_data_ptr();
  }
  at::parallel_for(0, sets[0].size(0), row_grain(sets[0].size(1)),
                   [&](int64_t begin, int64_t end) { kernels.given_gradient(g, begin, end); });
  return grads;
}

}  // namespace deepsim::cpu
