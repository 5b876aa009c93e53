// Distances of listed pairs, a warp for a pair, and their gradient, a warp for a row.
#pragma once

#include "pair_distances.h"
#include "row_gradient.cuh"

namespace deepsim::cuda {

__device__ __forceinline__ bool is_row(const Rows& rows, int64_t i) { return i >= 0 && i < rows.count; }

template <class S>
__global__ void __launch_bounds__(kRowThreads, 3) pair_distances_kernel(Batch batch, ListedPairs pairs, Compute<S>* distances) {
  const int64_t t = warp_index();
  if (t >= pairs.count) return;
  const int64_t i = pairs.rows[t], j = pairs.ref_rows[t], depth = batch.anchors.depth;
  double d = not_a_number<double>();
  if (is_row(batch.anchors, i) && is_row(batch.references, j)) {
    const S *a = row_of<S>(batch.anchors, i), *b = row_of<S>(batch.references, j);
    const bool cosine = batch.distance == Distance::cosine;
    d = distance_between(a, b, depth, batch.distance, cosine ? norm_of(a, depth) : 0, cosine ? norm_of(b, depth) : 0);
  }
  if (lane_index() == 0) distances[t] = Compute<S>(d);
}

template <class S>
__global__ void __launch_bounds__(kRowThreads, kGradientBlocks<S>) pair_gradient_kernel(PairGradient g) {
  using T = Compute<S>;
  auto& shared = shared_memory<GradientShared>();
  const Rows &rows = g.batch.anchors, &others = g.batch.references;
  const GradientPart part(rows.count);
  const int64_t i = part.row();
  RowGradient<S> own(g.batch, part.first_column);
  uint32_t begin = 0, end = 0;
  if (i < rows.count) {
    begin = uint32_t(lower_bound(g.sorted, g.count, i));
    end = begin + uint32_t(lower_bound(g.sorted + begin, g.count - begin, i + 1));
    own.take(rows, g.batch.anchor_norm, i);
  }
  const auto look = [&](uint32_t place) -> PullingPair<T> {
    const int64_t t = g.order[place], j = g.ref_rows[t];
    if (!is_row(others, j)) return {-1, not_a_number<T>(), not_a_number<T>()};
    return {int32_t(j), static_cast<const T*>(g.distances)[t], static_cast<const T*>(g.weights)[t]};
  };
  add_pairs_of_block(shared, own, part, rows, g.batch.anchor_norm, begin, end, others, g.batch.reference_norm, look);
  if (i >= rows.count) return;
  own.store([&](int64_t k, T v) { static_cast<T*>(g.grad)[i * rows.depth + k] = v; });
}

}  // namespace deepsim::cuda
