// Distances of listed pairs, and gradients from two sources: what tiles have gathered in packed form, and a list of pairs for every row.
#pragma once

#include "triplets.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class S>
void pair_distances(const Rows& rows, const Rows& others, const int32_t* row, const int32_t* other, Distance distance, int64_t begin,
                    int64_t end, typename ComputeOf<S>::type* distances) {
  using T = typename ComputeOf<S>::type;
  for (int64_t k = begin; k < end; ++k)
    distances[k] = T(distance_between(row_of<S>(rows, row[k]), row_of<S>(others, other[k]), rows.depth, distance));
}

// Row p of the gathered gradient as a row of the input's: unpacked, and for cosine distance, where it is the gradient g by the unit
// vector u = x / |x|, turned into (g - (g.u) u) / |x|, which is 0 for a zero row.
template <class S, class T>
DEEPSIM_INLINE void unpack_gradient(const PairGradient<T>& g, int64_t p, const S* x, double x_scale, T* sum) {
  constexpr int64_t NR = kPanelRows<T>;
  const int64_t depth = g.rows.depth;
  const T* gathered = g.gathered + (p / NR) * gathered_depth(depth) * NR + p % NR;
  const T *packed = g.packed + (p / NR) * depth * NR + p % NR, total = gathered[depth * NR];
  for (int64_t k = 0; k < depth; ++k) sum[k] = (gathered[k * NR] + total * packed[k * NR]) * g.gathered_factor;
  if (g.distance != Distance::cosine) return;
  const double along = sum_of(depth, [=](int64_t k) { return double(sum[k]) * (double(widen(x[k])) * x_scale); });
  for (int64_t k = 0; k < depth; ++k) sum[k] = T((double(sum[k]) - along * (double(widen(x[k])) * x_scale)) * x_scale);
}

// Rows of the packed positions [begin, end), each written to its place in `grad`, [rows][depth] in the type of the arithmetic.
template <class S>
void pair_gradient(const PairGradient<typename ComputeOf<S>::type>& g, int64_t begin, int64_t end,
                   typename ComputeOf<S>::type* grad) {
  const int64_t depth = g.rows.depth;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t i = g.original[p];
    const S* x = row_of<S>(g.rows, i);
    const double scale = g.row_scale ? g.row_scale[i] : 1.0;
    auto* sum = grad + i * depth;
    if (g.gathered) {
      unpack_gradient<S>(g, p, x, scale, sum);
    } else {
      for (int64_t k = 0; k < depth; ++k) sum[k] = 0;
    }
    for (int64_t pair = g.begin[p]; pair < g.begin[p + 1]; ++pair) {
      if (g.weight[pair] == 0) continue;
      const int32_t other = g.other[pair];
      add_distance_gradient(x, row_of<S>(g.others, other), depth, g.distance, g.pair_distance[pair], g.weight[pair], scale,
                            g.other_scale ? g.other_scale[other] : 1.0, sum);
    }
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
