// Which references may be near to the anchors of a stripe, by tensor cores: |a|^2 / 2 + |b|^2 / 2 - ab of centred rows.
#pragma once

#include "pair_products.cuh"

namespace deepsim::cuda {

static_assert(PairProduct::kWarpTile == kStripeColumns);

// One block for a tile of anchors and references.
__global__ void __launch_bounds__(PairProduct::kThreads, 2) near_products_kernel(Pairs pairs, Stripe stripe) {
  auto& stage = shared_memory<ProductStage<PairProduct>[kPairStages]>();
  if (pairs.flags->not_finite) return;
  const int64_t row_tiles = (stripe.rows + kGramTile - 1) / kGramTile;
  const int64_t first_row = blockIdx.x % row_tiles * kGramTile, first_column = blockIdx.x / row_tiles * PairProduct::kColumns;
  const int64_t depth = pairs.anchors.depth, columns = pairs.references.count;
  const CentredRows &a = pairs.centred_anchors, &b = pairs.centred_references;
  PairProduct product;
  const Matrix<float> anchors[1] = {{a.rows + stripe.first * a.stride, stripe.rows, depth, a.stride, 1}};
  multiply<false, false>(product, stage, anchors, first_row, Matrix<float>{b.rows, columns, depth, b.stride, 1}, first_column, false, 0,
                         depth);
  product.for_each_row([&](int r, int c, auto product_at) {
    const int64_t row = first_row + r, anchor = stripe.first + row;
    const bool inside = row < stripe.rows;
    const float half_norm = inside ? a.half_norm[anchor] : 0;
    float least = infinity<float>();
#pragma unroll
    for (int j = 0; j < PairProduct::kColumnFragments; ++j) {
      const int64_t column = first_column + c + j * 8;
      const auto half_square = [&](int next) {
        const int64_t other = column + next;
        if (!inside || other >= columns || (pairs.self_form && other == anchor)) return infinity<float>();
        return fmaxf((half_norm + b.half_norm[other]) - product_at(j, next), 0.0f);
      };
      const float2 pair{half_square(0), half_square(1)};
      least = fminf(least, fminf(pair.x, pair.y));
      if (inside && column < stripe.stride) {
        *reinterpret_cast<float2*>(static_cast<float*>(stripe.distances) + row * stripe.stride + column) = pair;
      }
    }
    for (int bits = 1; bits < 4; bits *= 2) least = fminf(least, __shfl_xor_sync(kAllLanes, least, bits));
    const int64_t first = first_column + c - lane_index() % 4 * 2;
    if (inside && lane_index() % 4 == 0 && first < stripe.stride) {
      stripe.least[(row * stripe.stride + first) / kStripeColumns] = least;
    }
  });
}

}  // namespace deepsim::cuda
