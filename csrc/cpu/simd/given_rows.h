// Distances between the rows of given pairs and triplets, and the gradient of what is made of them.
#pragma once

#include "triplets.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// 1 / |row|, 0 for a zero row, NaN where |row|^2 is not finite.
template <class S>
inline double inverse_norm(const S* row, int64_t depth) {
  const double square = square_of(row, depth);
  return square == 0 ? 0 : square < __builtin_inf() ? 1 / __builtin_sqrt(square) : __builtin_nan("");
}

template <class S>
void given_distances(const GivenRows& g, int64_t begin, int64_t end, double* distances) {
  const int64_t depth = g.sets[0].depth;
  const bool cosine = g.distance == Distance::cosine;
  for (int64_t t = begin; t < end; ++t) {
    double scale[kMostGivenSets] = {};
    if (cosine)
      for (int s = 0; s < g.set_count; ++s) scale[s] = inverse_norm(row_of<S>(g.sets[s], t), depth);
    for (int k = 0; k < g.pairs; ++k) {
      const int i = k / 2, j = (k + 3) / 2;
      const S *a = row_of<S>(g.sets[i], t), *b = row_of<S>(g.sets[j], t);
      double& d = distances[(t - begin) * kMostGivenPairs + k];
      if (!cosine) {
        d = distance_between(a, b, depth, g.distance);
        continue;
      }
      // |a/|a| - b/|b||^2 / 2 = 1 - cos, without its cancellation for nearly parallel rows. A zero row is at distance 1 from all that
      // is finite.
      const double half_square = sum_of(depth, [a, b, in_a = scale[i], in_b = scale[j]](int64_t k) {
                                   const double difference = double(widen(a[k])) * in_a - double(widen(b[k])) * in_b;
                                   return difference * difference;
                                 }) / 2;
      d = (scale[i] == 0 || scale[j] == 0) && half_square < __builtin_inf() ? 1 : half_square;
    }
  }
}

// Element by element, combine(x0, x1, x2, out): out becomes the sets' gradients. Of two sets, x2 is 0 and out[2] is nobody's.
template <class T, int kSets, class S, class Combine>
inline void combine_rows(const S* x0, const S* x1, const S* x2, S* __restrict g0, S* __restrict g1, S* __restrict g2, int64_t depth,
                         Combine combine) {
  using Sum = typename ComputeOf<S>::type;
  for (int64_t k = 0; k < depth; ++k) {
    T out[kMostGivenSets];
    combine(T(widen(x0[k])), T(widen(x1[k])), kSets == 3 ? T(widen(x2[k])) : T(0), out);
    narrow(Sum(out[0]), g0 + k);
    narrow(Sum(out[1]), g1 + k);
    if (kSets == 3) narrow(Sum(out[2]), g2 + k);
  }
}

// grad_i = sum over its pairs of weight * derivative of the distance by row i.
template <class S>
void given_gradient(const GivenGradient<typename ComputeOf<S>::type>& g, int64_t begin, int64_t end) {
  using T = typename ComputeOf<S>::type;
  const int64_t depth = g.rows.sets[0].depth, count = g.rows.sets[0].count;
  const int sets = g.rows.set_count;
  const auto combine_all = [sets, depth](auto zero, const auto& x, const auto& grad, auto combine) {
    using Sum = decltype(zero);
    const auto run = sets == 2 ? combine_rows<Sum, 2, S, decltype(combine)> : combine_rows<Sum, 3, S, decltype(combine)>;
    run(x[0], x[1], x[2], grad[0], grad[1], grad[2], depth, combine);
  };
  for (int64_t t = begin; t < end; ++t) {
    const T incoming = g.grad_loss[g.grad_loss_stride * t] * g.scale;
    const S* x[kMostGivenSets] = {};
    S* grad[kMostGivenSets] = {};
    for (int s = 0; s < sets; ++s) {
      x[s] = row_of<S>(g.rows.sets[s], t);
      grad[s] = static_cast<S*>(g.grads[s]) + t * depth;
    }
    T weight[kMostGivenPairs] = {}, d[kMostGivenPairs] = {};
    bool pulls = false;
    for (int k = 0; k < g.rows.pairs; ++k) {
      weight[k] = incoming * g.slopes[k * count + t];
      d[k] = g.distances[k * count + t];
      pulls = pulls || weight[k] != 0;
    }
    if (!pulls) {  // as all that have learnt enough
      for (int s = 0; s < sets; ++s)
        for (int64_t k = 0; k < depth; ++k) narrow(T(0), grad[s] + k);
      continue;
    }
    if (g.rows.distance == Distance::cosine) {
      // By u: (cos * u/|u| - v/|v|) / |u|, 0 for a zero row; cos = 1 - d.
      double scale[kMostGivenSets] = {}, own[kMostGivenSets] = {}, between[kMostGivenPairs] = {};
      for (int s = 0; s < sets; ++s) scale[s] = inverse_norm(x[s], depth);
      for (int k = 0; k < g.rows.pairs; ++k) {
        const int i = k / 2, j = (k + 3) / 2;
        const double along = double(weight[k]) * (1 - double(d[k]));
        own[i] += along * scale[i] * scale[i];
        own[j] += along * scale[j] * scale[j];
        between[k] = -double(weight[k]) * scale[i] * scale[j];
      }
      combine_all(0.0, x, grad, [&](double a, double p, double n, double (&out)[kMostGivenSets]) {
        out[0] = own[0] * a + between[0] * p + between[1] * n;
        out[1] = own[1] * p + between[0] * a + between[2] * n;
        out[2] = own[2] * n + between[1] * a + between[2] * p;
      });
      continue;
    }
    // By u: (u - v) / d, taken as 0 at d = 0.
    T factor[kMostGivenPairs];
    for (int k = 0; k < kMostGivenPairs; ++k) factor[k] = euclidean_factor(g.rows.distance, d[k], weight[k]);
    combine_all(T(0), x, grad, [&](T a, T p, T n, T (&out)[kMostGivenSets]) {
      const T ap = factor[0] * (a - p), an = factor[1] * (a - n), pn = factor[2] * (p - n);
      out[0] = ap + an;
      out[1] = pn - ap;
      out[2] = -an - pn;
    });
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
