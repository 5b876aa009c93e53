// What all losses over pairs share on CUDA: distances, gradients, sums. The row kernels stand in files of their own.
#include "all_pairs.h"

#include <algorithm>

#include "dispatch.cuh"
#include "pair_distances.cuh"
#include "pull.cuh"
#include "row_sums.cuh"

namespace deepsim::cuda {

void pair_distances(const Batch& batch, const Stripe& stripe, void* stream) {
  const int64_t tiles = blocks_for(stripe.rows, kDirectTile) * blocks_for(batch.references.count, kDirectTile);
  dispatch(batch.storage, [&](auto s) {
    using S = decltype(s);
    launch(pair_distances_kernel<S>, tiles, kDirectThreads, sizeof(DirectElements<Compute<S>>), stream, batch, stripe);
  });
}

// Enough blocks to fill a large GPU twice, as long as every split has some work.
int pull_splits(const Batch& batch, const Stripe& stripe, bool of_anchors) {
  constexpr int64_t kBlocks = 264, kFewestOthers = 16 * kPullOthers;
  const int64_t own = of_anchors ? stripe.rows : batch.references.count, others = of_anchors ? batch.references.count : stripe.rows;
  const int64_t tiles = blocks_for(own, kPullTile) * blocks_for(batch.anchors.depth, kPullTile);
  return int(std::clamp<int64_t>(kBlocks / tiles, 1, std::max<int64_t>(1, others / kFewestOthers)));
}

void pull(const Batch& batch, const Stripe& stripe, bool of_anchors, int splits, void* partial, void* gradient, void* stream) {
  PullArguments p = {batch.anchors, batch.references, batch.anchor_norm, batch.reference_norm, stripe.first, stripe.rows,
                     0, batch.references.count, stripe.strengths, stripe.stride, 1, splits, batch.flags,
                     partial, false};
  if (!of_anchors) {
    std::swap(p.own, p.others);
    std::swap(p.own_norm, p.other_norm);
    std::swap(p.first_own, p.first_other);
    std::swap(p.own_count, p.other_count);
    std::swap(p.own_stride, p.other_stride);
  }
  const int64_t depth = batch.anchors.depth, elements = p.own_count * depth;
  const int64_t blocks = blocks_for(p.own_count, kPullTile) * blocks_for(depth, kPullTile) * splits;
  dispatch(batch.storage, [&](auto s) {
    using S = decltype(s);
    using T = Compute<S>;
    T* to = static_cast<T*>(gradient) + p.first_own * depth;
    if (splits == 1) {
      p.out = to;
      p.accumulate = true;
    }
    launch(pull_kernel<S>, blocks, kBlockThreads, sizeof(PullShared<T>), stream, p);
    if (splits == 1) return;
    launch(add_splits_kernel<T>, blocks_for(elements, 256), 256, 0, stream, static_cast<const T*>(partial), splits, elements,
           batch.flags, to);
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
