// Losses of given pairs and triplets of rows, and their gradient: a warp for a row.
#pragma once

#include "given_rows.h"
#include "loss_sum.cuh"

namespace deepsim::cuda {

// The distances of row t, the same in all lanes; NaN where its numbers or their squares are not finite.
template <class S, int kSets>
__device__ __forceinline__ void given_distances(const GivenRows& g, int64_t t, double (&d)[kMostGivenPairs]) {
  const int64_t depth = g.sets[0].depth;
  const S* x[kSets];
  double norm[kMostGivenSets] = {};
#pragma unroll
  for (int s = 0; s < kSets; ++s) {
    x[s] = row_of<S>(g.sets[s], t);
    if (g.distance == Distance::cosine) norm[s] = norm_of(x[s], depth);
  }
  if constexpr (kSets == 2) {
    d[0] = distance_between(x[0], x[1], depth, g.distance, norm[0], norm[1]);
  } else {
    double of_anchor[2];
    distances_between<2, S>(x[0], {x[1], x[2]}, depth, g.distance, norm[0], {norm[1], norm[2]}, of_anchor);
    d[0] = of_anchor[0];
    d[1] = of_anchor[1];
    if (g.pairs == 3) d[2] = distance_between(x[1], x[2], depth, g.distance, norm[1], norm[2]);
  }
  // Beyond a margin, or beside a zero row, a row that is not finite would not be seen.
  const double all = (d[0] + d[1] + d[2]) + (norm[0] + norm[1] + norm[2]);
  if (!(all < infinity<double>())) d[0] = d[1] = d[2] = not_a_number<double>();
}

template <class S, class Formula>
__global__ void __launch_bounds__(kRowThreads, 3) given_losses_kernel(GivenRows g, Formula formula, GivenLosses out) {
  using T = Compute<S>;
  const int64_t t = warp_index(), rows = g.sets[0].count;
  LossPart part = {0, 0};
  if (t < rows) {
    double d[kMostGivenPairs] = {}, slopes[kMostGivenPairs] = {};
    given_distances<S, Formula::kSets>(g, t, d);
    if (lane_index() == 0) {
      const bool finite = d[0] == d[0];
      const T loss = finite ? T(formula(t, d, slopes)) : not_a_number<T>();
#pragma unroll
      for (int k = 0; k < kMostGivenPairs; ++k) {
        if (k >= g.pairs) break;
        static_cast<T*>(out.distances)[k * rows + t] = T(d[k]);
        static_cast<T*>(out.slopes)[k * rows + t] = finite ? T(slopes[k]) : not_a_number<T>();
      }
      if (out.reduction == Reduction::none) static_cast<T*>(out.loss)[t] = loss;
      part = {double(loss), out.reduction == Reduction::mean || loss > 0};
    }
  }
  if (out.reduction == Reduction::none) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *static_cast<T*>(out.scale) = 1;
    return;
  }
  auto& shared = shared_memory<LossShared>();
  if (!sum_losses(part, out.parts, out.finished, shared)) return;
  const auto [sum, count] = shared.part[0];
  const int64_t divisor = out.reduction == Reduction::sum || count == 0 ? 1 : count;
  *static_cast<T*>(out.loss) = T(sum / double(divisor));
  *static_cast<T*>(out.scale) = T(1) / T(divisor);
}

// Elements that a lane has of each set at a time: read together, for a warp waits for what it reads.
constexpr int kGivenRun = 4;

// Element by element of row t, combine(x0, x1, x2, out): out becomes the sets' gradients. Of two sets, x2 is 0 and out[2] is nobody's.
template <class T, class S, int kSets, class Combine>
__device__ __forceinline__ void combine_rows(const GivenGradient& g, int64_t t, Combine combine) {
  const int64_t depth = g.rows.sets[0].depth;
  for (int64_t first = lane_index(); first < depth; first += kGivenRun * kWarp) {
    T x[kGivenRun][kMostGivenSets] = {};
#pragma unroll
    for (int e = 0; e < kGivenRun; ++e) {
      const int64_t k = first + e * kWarp;
#pragma unroll
      for (int s = 0; s < kSets; ++s)
        if (k < depth) x[e][s] = T(widen(row_of<S>(g.rows.sets[s], t)[k]));
    }
#pragma unroll
    for (int e = 0; e < kGivenRun; ++e) {
      const int64_t k = first + e * kWarp;
      T out[kMostGivenSets];
      combine(x[e][0], x[e][1], x[e][2], out);
#pragma unroll
      for (int s = 0; s < kSets; ++s)
        if (k < depth) narrow(Compute<S>(out[s]), static_cast<S*>(g.grads[s])[t * depth + k]);
    }
  }
}

template <class S, int kSets>
__global__ void __launch_bounds__(kRowThreads, 3) given_gradient_kernel(GivenGradient g) {
  using T = Compute<S>;
  const int64_t t = warp_index(), rows = g.rows.sets[0].count, depth = g.rows.sets[0].depth;
  if (t >= rows) return;
  const T incoming = static_cast<const T*>(g.grad_loss)[g.grad_loss_stride * t] * *static_cast<const T*>(g.scale);
  T weight[kMostGivenPairs] = {}, d[kMostGivenPairs] = {};
#pragma unroll
  for (int k = 0; k < kMostGivenPairs; ++k) {
    if (k >= g.rows.pairs) break;
    weight[k] = incoming * static_cast<const T*>(g.slopes)[k * rows + t];
    d[k] = static_cast<const T*>(g.distances)[k * rows + t];
  }
  if (weight[0] == 0 && weight[1] == 0 && weight[2] == 0) {  // as of all that have learnt enough
    for (int64_t k = lane_index(); k < depth; k += kWarp)
      for (int s = 0; s < kSets; ++s) narrow(T(0), static_cast<S*>(g.grads[s])[t * depth + k]);
    return;
  }
  if (g.rows.distance == Distance::cosine) {
    // By u: (cos * u/|u| - v/|v|) / |u|, 0 for a zero row; cos = 1 - d.
    double scale[kMostGivenSets] = {}, own[kMostGivenSets] = {}, between[kMostGivenPairs] = {};
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const double norm = norm_of(row_of<S>(g.rows.sets[s], t), depth);
      scale[s] = norm == 0 ? 0 : 1 / norm;
    }
#pragma unroll
    for (int k = 0; k < (kSets == 2 ? 1 : kMostGivenPairs); ++k) {
      const int i = k / 2, j = (k + 3) / 2;
      const double along = double(weight[k]) * (1 - double(d[k]));
      own[i] += along * scale[i] * scale[i];
      own[j] += along * scale[j] * scale[j];
      between[k] = -double(weight[k]) * scale[i] * scale[j];
    }
    combine_rows<double, S, kSets>(g, t, [&](double a, double p, double n, double (&out)[kMostGivenSets]) {
      out[0] = own[0] * a + between[0] * p + between[1] * n;
      out[1] = own[1] * p + between[0] * a + between[2] * n;
      out[2] = own[2] * n + between[1] * a + between[2] * p;
    });
    return;
  }
  T factor[kMostGivenPairs];
#pragma unroll
  for (int k = 0; k < kMostGivenPairs; ++k) factor[k] = euclidean_factor(g.rows.distance, d[k], weight[k]);
  combine_rows<T, S, kSets>(g, t, [&](T a, T p, T n, T (&out)[kMostGivenSets]) {
    const T ap = factor[0] * (a - p), an = factor[1] * (a - n), pn = factor[2] * (p - n);
    out[0] = ap + an;
    out[1] = pn - ap;
    out[2] = -an - pn;
  });
}

}  // namespace deepsim::cuda
