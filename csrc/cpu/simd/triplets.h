// Distances of chosen triplets by direct differences, and their gradient gathered row by row.
#pragma once

#include "rows.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class S>
inline double distance_between(const S* a, const S* b, int64_t depth, Distance distance) {
  if (distance == Distance::cosine) {
    const double aa = square_of(a, depth), bb = square_of(b, depth);
    if (aa == 0 || bb == 0) return 1;
    // |a/|a| - b/|b||^2 / 2 = 1 - cos, without its cancellation for nearly parallel rows.
    // Divided, not multiplied by the inverse: so rows of one column become exactly 1 and -1.
    const double norm_a = __builtin_sqrt(aa), norm_b = __builtin_sqrt(bb);
    return sum_of(depth, [=](int64_t k) {
             const double difference = double(widen(a[k])) / norm_a - double(widen(b[k])) / norm_b;
             return difference * difference;
           }) / 2;
  }
  const double square = sum_of(depth, [=](int64_t k) {
    const double difference = double(widen(a[k])) - double(widen(b[k]));
    return difference * difference;
  });
  return distance == Distance::euclidean ? __builtin_sqrt(square) : square;
}

template <class S>
void triplet_distances(const Rows& anchors, const Rows& references, const int32_t* positives, const int32_t* negatives,
                       Distance distance, int64_t begin, int64_t end, typename ComputeOf<S>::type* d_ap,
                       typename ComputeOf<S>::type* d_an) {
  using T = typename ComputeOf<S>::type;
  for (int64_t a = begin; a < end; ++a) {
    d_ap[a] = d_an[a] = T(0);
    if (positives[a] < 0) continue;
    const S* anchor = row_of<S>(anchors, a);
    d_ap[a] = T(distance_between(anchor, row_of<S>(references, positives[a]), anchors.depth, distance));
    d_an[a] = T(distance_between(anchor, row_of<S>(references, negatives[a]), anchors.depth, distance));
  }
}

// What u - other is multiplied by in coefficient * (derivative of d(u, other) by u): (u - other) / d if d is Euclidean, taken as 0 at 0.
// NaN where either is.
template <class T>
DEEPSIM_INLINE T euclidean_factor(Distance distance, T d, T coefficient) {
  if (distance == Distance::sqeuclidean) return 2 * coefficient;
  if (d > 0) return coefficient / d;
  return d == 0 && coefficient == coefficient ? T(0) : d + coefficient;
}

// sum += coefficient * (derivative of d(u, other) by u).
template <class S, class T>
DEEPSIM_INLINE void add_distance_gradient(const S* u, const S* other, int64_t depth, Distance distance, T d, T coefficient,
                                          double u_scale, double other_scale, T* sum) {
  if (distance == Distance::cosine) {
    // (cos * u/|u| - other/|other|) / |u|, 0 for a zero row; cos = 1 - d.
    const double on_u = double(coefficient) * (1 - double(d)) * u_scale * u_scale;
    const double on_other = double(coefficient) * u_scale * other_scale;
    for (int64_t k = 0; k < depth; ++k) sum[k] += T(on_u * double(widen(u[k])) - on_other * double(widen(other[k])));
    return;
  }
  const T factor = euclidean_factor(distance, d, coefficient);
  for (int64_t k = 0; k < depth; ++k) sum[k] += factor * (T(widen(u[k])) - T(widen(other[k])));
}

template <class S, class T>
inline void add_own_triplet(const TripletGradient<T>& g, int64_t a, T* sum) {
  if (g.positives[a] < 0 || g.coefficient[a] == 0) return;
  const auto add = [&](int32_t other, T d, T coefficient) {
    add_distance_gradient(row_of<S>(g.anchors, a), row_of<S>(g.references, other), g.anchors.depth, g.distance, d, coefficient,
                          g.anchor_scale ? g.anchor_scale[a] : 0.0, g.reference_scale ? g.reference_scale[other] : 0.0, sum);
  };
  add(g.positives[a], g.d_ap[a], g.coefficient[a]);
  add(g.negatives[a], g.d_an[a], -g.coefficient[a]);
}

template <class S, class T>
inline void add_uses(const TripletGradient<T>& g, int64_t j, T* sum) {
  for (int64_t u = g.use_begin[j]; u < g.use_begin[j + 1]; ++u) {
    const int32_t a = g.uses[u] / 2;
    if (g.coefficient[a] == 0) continue;
    const bool negative = g.uses[u] % 2;
    add_distance_gradient(row_of<S>(g.references, j), row_of<S>(g.anchors, a), g.anchors.depth, g.distance,
                          negative ? g.d_an[a] : g.d_ap[a], negative ? -g.coefficient[a] : g.coefficient[a],
                          g.reference_scale ? g.reference_scale[j] : 0.0, g.anchor_scale ? g.anchor_scale[a] : 0.0, sum);
  }
}

template <class S, bool kOwn, bool kUses>
void triplet_gradient(const TripletGradient<typename ComputeOf<S>::type>& g, int64_t begin, int64_t end,
                      typename ComputeOf<S>::type* sum, void* grad) {
  const int64_t depth = g.anchors.depth;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t k = 0; k < depth; ++k) sum[k] = 0;
    if constexpr (kOwn) add_own_triplet<S>(g, i, sum);
    if constexpr (kUses) add_uses<S>(g, i, sum);
    S* out = static_cast<S*>(grad) + i * depth;
    for (int64_t k = 0; k < depth; ++k) narrow(sum[k], out + k);
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
