// The distances of a stripe of anchors to all references by differences, in float64.
#pragma once

#include "all_pairs.h"
#include "direct_tile.cuh"

namespace deepsim::cuda {

// No pair of a tile of kDirectTile anchors and kColumns references pulls by itself yet.
template <int kColumns>
__device__ __forceinline__ void clear_marks(const Stripe& stripe, int64_t first_row, int64_t first_column) {
  constexpr int kWords = kColumns / 32;
  if (!stripe.single) return;
  for (int i = int(threadIdx.x); i < kDirectTile * kWords; i += kDirectThreads) {
    const int64_t row = first_row + i / kWords, word = first_column / 32 + i % kWords, words = stripe.stride / 32;
    if (row < stripe.rows && word < words) stripe.single[row * words + word] = 0;
  }
}

// One block for a tile of anchors and references.
__global__ void __launch_bounds__(kDirectThreads, 2) stripe_distances_kernel(Pairs pairs, Stripe stripe) {
  auto& shared = shared_memory<DirectElements<double>>();
  const int64_t row_tiles = (stripe.rows + kDirectTile - 1) / kDirectTile;
  const int64_t first_row = blockIdx.x % row_tiles * kDirectTile, first_column = blockIdx.x / row_tiles * kDirectTile;
  clear_marks<kDirectTile>(stripe, first_row, first_column);
  double square[kDirectPerThread][kDirectPerThread];
  direct_squares<double>(shared, pairs.anchors, pairs.anchor_norm, stripe.first + first_row, pairs.references, pairs.reference_norm,
                         first_column, square);
  bool finite = true;
  for (int i = 0; i < kDirectPerThread; ++i) {
    for (int j = 0; j < kDirectPerThread; ++j) {
      const int64_t row = first_row + direct_row() + i, column = first_column + direct_column() + j;
      if (row >= stripe.rows || column >= pairs.references.count) continue;
      double d = square[i][j];
      finite = finite && d < infinity<double>();
      if (pairs.distance == Distance::euclidean) d = std::sqrt(d);
      if (pairs.distance == Distance::cosine) {
        // |a/|a| - b/|b||^2 / 2 = 1 - cos; a zero row is at distance 1 from everyone.
        const bool zero = pairs.anchor_norm[stripe.first + row] == 0 || pairs.reference_norm[column] == 0;
        d = zero ? 1 : d / 2;
      }
      static_cast<double*>(stripe.distances)[row * stripe.stride + column] = d;
    }
  }
  if (!finite) atomicOr(&pairs.flags->not_finite, 1);
}

}  // namespace deepsim::cuda
