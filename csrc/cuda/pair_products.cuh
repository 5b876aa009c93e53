// The distances of a stripe of anchors to all references by tensor cores, as |a|^2 + |b|^2 - 2ab of centred rows.
//
// Where too little is left of that, rows are close to each other and their distance is measured by differences. Few of a tile are
// measured by a thread each; many by the tile of differences that float64 has. Both add up in the same order: copies of a row are equally
// far from an anchor, whichever tiles they are in.
#pragma once

#include "all_pairs.h"
#include "strength.cuh"
#include "stripe_distances.cuh"
#include "tile_product.cuh"

namespace deepsim::cuda {

// 64 anchors by 128 references.
using PairProduct = TensorProduct<float, 128, 1, true>;
static_assert(PairProduct::kThreads == kDirectThreads && kDirectTile == kGramTile && PairProduct::kColumns % kDirectTile == 0);

constexpr int kPairStages = 2;
// A tile of differences takes as long as about so many pairs by themselves.
constexpr int kMostMeasuredSingly = 128;

struct PairTileShared {
  union {
    ProductStage<PairProduct> stage[kPairStages];
    DirectElements<float> direct;
  };
  int close;  // pairs of the tile; where they are, as long as they are few
  uint16_t at[kMostMeasuredSingly];
};

// What differences add up to, as direct_squares does it.
template <class S>
__device__ __forceinline__ float direct_square(const Pairs& pairs, int64_t anchor, int64_t reference) {
  const S *a = row_of<S>(pairs.anchors, anchor), *b = row_of<S>(pairs.references, reference);
  float square = 0;
  for (int64_t k = 0; k < pairs.anchors.depth; ++k) {
    const float difference = normalised<float>(a[k], pairs.anchor_norm, anchor) - normalised<float>(b[k], pairs.reference_norm, reference);
    square += difference * difference;
  }
  return square;
}

template <class S>
__global__ void __launch_bounds__(PairProduct::kThreads, 2) pair_products_kernel(Pairs pairs, Stripe stripe) {
  constexpr float kClose = -1;  // in the place of a distance that is not there yet
  auto& shared = shared_memory<PairTileShared>();
  if (pairs.flags->not_finite) return;
  const int64_t row_tiles = (stripe.rows + kGramTile - 1) / kGramTile;
  const int64_t first_row = blockIdx.x % row_tiles * kGramTile, first_column = blockIdx.x / row_tiles * PairProduct::kColumns;
  const int64_t depth = pairs.anchors.depth, columns = pairs.references.count;
  const CentredRows &a = pairs.centred_anchors, &b = pairs.centred_references;
  float* distances = static_cast<float*>(stripe.distances);
  clear_marks<PairProduct::kColumns>(stripe, first_row, first_column);
  if (threadIdx.x == 0) shared.close = 0;

  PairProduct product;
  const Matrix<float> anchors[1] = {{a.rows + stripe.first * a.stride, stripe.rows, depth, a.stride, 1}};
  multiply<false, false>(product, shared.stage, anchors, first_row, Matrix<float>{b.rows, columns, depth, b.stride, 1}, first_column, false,
                         0, depth);
  product.for_each_pair([&](int r, int c, float first, float second) {
    const int64_t row = first_row + r, column = first_column + c;
    if (row >= stripe.rows || column >= columns) return;
    const float half_norm = a.half_norm[stripe.first + row];
    const auto distance = [&](int next, float ab) {
      if (column + next >= columns) return 0.0f;  // nobody reads it
      if (pairs.self_form && column + next == stripe.first + row) return 0.0f;  // or it would be measured, as it is close
      const float other = b.half_norm[column + next], half_square = (half_norm + other) - ab;
      if (!is_close(half_square, half_norm, other)) return distance_of_half_square(pairs.distance, half_square);
      const int slot = atomicAdd(&shared.close, 1);
      if (slot < kMostMeasuredSingly) shared.at[slot] = uint16_t(r * PairProduct::kColumns + c + next);
      return kClose;
    };
    *reinterpret_cast<float2*>(distances + row * stripe.stride + column) = float2{distance(0, first), distance(1, second)};
  });
  __syncthreads();  // all are through with the stages, and know of the tile's close pairs
  const int close = shared.close;
  const auto measured = [&](int64_t row, int64_t column, float square) {
    distances[row * stripe.stride + column] = distance_of_half_square(pairs.distance, square / 2);
  };
  if (close <= kMostMeasuredSingly) {
    for (int i = int(threadIdx.x); i < close; i += PairProduct::kThreads) {
      const int64_t row = first_row + shared.at[i] / PairProduct::kColumns, column = first_column + shared.at[i] % PairProduct::kColumns;
      measured(row, column, direct_square<S>(pairs, stripe.first + row, column));
    }
    return;
  }
  for (int part = 0; part < PairProduct::kColumns; part += kDirectTile) {
    float square[kDirectPerThread][kDirectPerThread];
    direct_squares<S>(shared.direct, pairs.anchors, pairs.anchor_norm, stripe.first + first_row, pairs.references, pairs.reference_norm,
                      first_column + part, square);
    for (int i = 0; i < kDirectPerThread; ++i) {
      for (int j = 0; j < kDirectPerThread; ++j) {
        const int64_t row = first_row + direct_row() + i, column = first_column + part + direct_column() + j;
        if (row >= stripe.rows || column >= columns || distances[row * stripe.stride + column] != kClose) continue;
        measured(row, column, square[i][j]);
      }
    }
  }
}

}  // namespace deepsim::cuda
