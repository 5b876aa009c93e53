// What all losses over pairs share on CUDA: distances, gradients, sums. The row kernels stand in files of their own.
#include "all_pairs.h"

#include <algorithm>

#include "centre_rows.cuh"
#include "dispatch.cuh"
#include "near_products.cuh"
#include "pair_products.cuh"
#include "pull.cuh"
#include "pull_products.cuh"
#include "pull_singles.cuh"
#include "row_sums.cuh"

namespace deepsim::cuda {

void centre_rows(const Pairs& pairs, const Centre& centre, void* stream) {
  constexpr int kThreads = 256;
  find_centre(pairs, centre, stream);
  dispatch(pairs.storage, [&](auto s) {
    const auto run = [&](const Rows& x, const double* norms, const CentredRows& out) {
      launch(centre_rows_kernel<decltype(s)>, blocks_for(x.count, kThreads / kWarp), kThreads, 0, stream, x, norms, centre.at, pairs.flags,
             out);
    };
    run(pairs.anchors, pairs.anchor_norm, pairs.centred_anchors);
    if (!pairs.self_form) run(pairs.references, pairs.reference_norm, pairs.centred_references);
  });
}

void stripe_distances(const Pairs& pairs, const Stripe& stripe, void* stream) {
  const auto tiles = [&](int64_t columns) {
    return blocks_for(stripe.rows, kDirectTile) * blocks_for(pairs.references.count, columns);
  };
  dispatch(pairs.storage, [&](auto s) {
    using S = decltype(s);
    if constexpr (std::is_same_v<S, double>) {
      launch(stripe_distances_kernel, tiles(kDirectTile), kDirectThreads, sizeof(DirectElements<double>), stream, pairs, stripe);
    } else if (stripe.least) {
      launch(near_products_kernel, tiles(PairProduct::kColumns), PairProduct::kThreads, sizeof(ProductStage<PairProduct>[kPairStages]),
             stream, pairs, stripe);
    } else {
      launch(pair_products_kernel<S>, tiles(PairProduct::kColumns), PairProduct::kThreads, sizeof(PairTileShared), stream, pairs, stripe);
    }
  });
}

// Enough blocks to fill a large GPU twice, as long as every split has some work.
int pull_splits(const Pairs& pairs, const Stripe& stripe, bool of_anchors) {
  constexpr int64_t kBlocks = 264, kFewestOthers = 256;
  const int64_t own = of_anchors ? stripe.rows : pairs.references.count, others = of_anchors ? pairs.references.count : stripe.rows;
  const int64_t elements = pairs.storage == Storage::float64 ? kPullTile : PullProduct::kColumns;
  const int64_t tiles = blocks_for(own, kPullTile) * blocks_for(pairs.anchors.depth, elements);
  return int(std::clamp<int64_t>(kBlocks / tiles, 1, std::max<int64_t>(1, others / kFewestOthers)));
}

namespace {

void launch_pull_products(const Pairs& pairs, const Stripe& stripe, bool of_anchors, int splits, float* out, bool accumulate,
                          void* stream) {
  const auto from = [](const CentredRows& x, int64_t first) {
    return CentredRows{x.rows + first * x.stride, x.stride, x.half_norm + first};
  };
  const int64_t references = pairs.references.count, depth = pairs.anchors.depth;
  const float* strengths = static_cast<const float*>(stripe.strengths);
  PullProducts p = {{strengths, stripe.rows, references, stripe.stride, 1},
                    from(pairs.centred_anchors, stripe.first),
                    from(pairs.centred_references, 0),
                    depth,
                    static_cast<const float*>(stripe.anchor_sums),
                    splits,
                    pairs.flags,
                    out,
                    accumulate};
  if (!of_anchors) {
    p.strengths = {strengths, references, stripe.rows, 1, stripe.stride};
    std::swap(p.own, p.others);
    p.sums = static_cast<const float*>(stripe.reference_sums);
    launch(strength_sums_kernel, blocks_for(references, kSumColumns), kBlockThreads, kBlockThreads * sizeof(float), stream, stripe,
           references, pairs.flags);
  }
  const int64_t blocks = blocks_for(p.strengths.rows, kGramTile) * blocks_for(depth, PullProduct::kColumns) * splits;
  launch(of_anchors ? pull_products_kernel<false> : pull_products_kernel<true>, blocks, PullProduct::kThreads,
         sizeof(ProductStage<PullProduct>[kPullStages]), stream, p);
}

void launch_pull(const Pairs& pairs, const Stripe& stripe, bool of_anchors, int splits, double* out, bool accumulate, void* stream) {
  PullArguments p = {pairs.anchors, pairs.references, pairs.anchor_norm, pairs.reference_norm, stripe.first, stripe.rows, 0,
                     pairs.references.count, static_cast<const double*>(stripe.strengths), stripe.stride, 1, splits, pairs.flags, out,
                     accumulate};
  if (!of_anchors) {
    std::swap(p.own, p.others);
    std::swap(p.own_norm, p.other_norm);
    std::swap(p.first_own, p.first_other);
    std::swap(p.own_count, p.other_count);
    std::swap(p.own_stride, p.other_stride);
  }
  const int64_t blocks = blocks_for(p.own_count, kPullTile) * blocks_for(p.own.depth, kPullTile) * splits;
  launch(pull_kernel, blocks, kBlockThreads, sizeof(PullShared), stream, p);
}

}  // namespace

void pull(const Pairs& pairs, const Stripe& stripe, bool of_anchors, int splits, void* partial, void* gradient, void* stream) {
  const int64_t depth = pairs.anchors.depth, elements = (of_anchors ? stripe.rows : pairs.references.count) * depth;
  dispatch_compute(pairs.storage, [&](auto t) {
    using T = decltype(t);
    T* to = static_cast<T*>(gradient) + (of_anchors ? stripe.first * depth : 0);
    T* out = splits == 1 ? to : static_cast<T*>(partial);
    if constexpr (std::is_same_v<T, double>) {
      launch_pull(pairs, stripe, of_anchors, splits, out, splits == 1, stream);
    } else {
      launch_pull_products(pairs, stripe, of_anchors, splits, out, splits == 1, stream);
    }
    if (splits == 1) return;
    launch(add_splits_kernel<T>, blocks_for(elements, 256), 256, 0, stream, static_cast<const T*>(partial), splits, elements, pairs.flags,
           to);
  });
}

void pull_singles(const Pairs& pairs, const Stripe& stripe, bool of_anchors, void* gradient, void* stream) {
  constexpr int kThreads = 256;
  const int64_t rows = of_anchors ? stripe.rows : pairs.references.count;
  const int64_t warps = rows * blocks_for(pairs.anchors.depth, kSingleDepth);
  dispatch(pairs.storage, [&](auto s) {
    using S = decltype(s);
    launch(of_anchors ? pull_singles_kernel<S, true> : pull_singles_kernel<S, false>, blocks_for(warps, kThreads / kWarp), kThreads, 0,
           stream, pairs, stripe, gradient);
  });
}

void finish_gradient(const Batch& batch, bool of_anchors, const double* scale, void* gradient, void* stream) {
  const Rows& x = of_anchors ? batch.anchors : batch.references;
  const double* norms = of_anchors ? batch.anchor_norm : batch.reference_norm;
  if (x.count == 0) return;
  dispatch(batch.storage, [&](auto s) {
    launch(finish_gradient_kernel<decltype(s)>, blocks_for(x.count, kBlockWarps), kBlockThreads, 0, stream, x, norms, batch.flags, scale,
           gradient);
  });
}

void finish_triplets(const Batch& batch, const RowSums* sums, SumReduction reduction, const LossOutputs& out, void* stream) {
  dispatch_compute(batch.storage, [&](auto t) {
    launch(finish_sums_kernel<decltype(t), TripletFormula>, 1, kBlockThreads, sizeof(RowSumsShared), stream, sums, batch.anchors.count,
           batch.flags, TripletFormula{reduction}, out);
  });
}

void finish_pairs(const Batch& batch, const RowSums* sums, SumReduction reduction, const PairMargins& margins, const LossOutputs& out,
                  void* stream) {
  dispatch_compute(batch.storage, [&](auto t) {
    using T = decltype(t);
    launch(finish_sums_kernel<T, PairFormula>, 1, kBlockThreads, sizeof(RowSumsShared), stream, sums, batch.anchors.count, batch.flags,
           PairFormula{reduction, is_beyond_comparison<T>(margins.negative)}, out);
  });
}

}  // namespace deepsim::cuda
