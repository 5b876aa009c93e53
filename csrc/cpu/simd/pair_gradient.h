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

template <class S>
void pair_gradient(const PairSides& sides, int64_t row, const ListedPair<typename ComputeOf<S>::type>* pairs, int64_t count,
                   typename ComputeOf<S>::type* grad) {
  const S* x = row_of<S>(sides.rows, row);
  for (int64_t t = 0; t < count; ++t) {
    const auto [other, distance, weight] = pairs[t];
    add_distance_gradient(x, row_of<S>(sides.others, other), sides.rows.depth, sides.distance, distance, weight,
                          sides.row_scale ? sides.row_scale[row] : 1.0, sides.other_scale ? sides.other_scale[other] : 1.0, grad);
  }
}

// The gathered gradient is unpacked, and for cosine distance, where it is the gradient g by the unit vector u = x / |x|, turned into
// (g - (g.u) u) / |x|, which is 0 for a zero row.
template <class S>
void finish_gradient(const GatheredRows<typename ComputeOf<S>::type>& g, int64_t begin, int64_t end, typename ComputeOf<S>::type* grad) {
  using T = typename ComputeOf<S>::type;
  constexpr int64_t NR = kPanelRows<T>;
  const int64_t depth = g.rows.depth;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t i = g.original[p];
    T* out = grad + i * depth;
    for (int64_t k = 0; k < depth; ++k) out[k] *= g.factor;
    if (g.gathered == nullptr) continue;
    const T* gathered = g.gathered + (p / NR) * gathered_depth(depth) * NR + p % NR;
    const T *packed = g.packed + (p / NR) * depth * NR + p % NR, total = gathered[depth * NR];
    const auto pulled = [=, &g](int64_t k) { return (gathered[k * NR] + total * packed[k * NR]) * g.gathered_factor; };
    if (g.distance != Distance::cosine) {
      for (int64_t k = 0; k < depth; ++k) out[k] += pulled(k);
      continue;
    }
    const S* x = row_of<S>(g.rows, i);
    const double scale = g.row_scale[i];
    const double along = sum_of(depth, [=](int64_t k) { return double(pulled(k)) * (double(widen(x[k])) * scale); });
    for (int64_t k = 0; k < depth; ++k) out[k] += T((double(pulled(k)) - along * (double(widen(x[k])) * scale)) * scale);
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
