// Mining by strategy on CUDA: one anchor's positive and negative from its distances.
#include "anchor_row.cuh"
#include "dispatch.cuh"

namespace deepsim::cuda {
namespace {

template <class T>
struct MiningShared {
  T best[kBlockWarps];
  int32_t best_index[kBlockWarps];
};

// The farthest (or nearest) of an anchor's positives (or negatives) that are farther than `above` and nearer than `below`.
template <bool kPositives, class T>
__device__ __forceinline__ Best<T, true> choose(const AnchorRow<T>& row, bool nearest, T above, T below, MiningShared<T>& shared) {
  const T sign = nearest ? T(-1) : T(1);
  Best<T, true> best;
  for_columns(row, [&](int64_t c, const Column<T>& column) {
    const T d = column.distance;
    if ((kPositives ? row.is_positive(c, column) : row.is_negative(column)) && d > above && d < below) best.improve(sign * d, int32_t(c));
  });
  best = block_best(best, shared.best, shared.best_index);
  best.value *= sign;
  return best;
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) mine_rows_kernel(Pairs pairs, Stripe stripe, Strategies strategies, DirectFound found) {
  auto& shared = shared_memory<MiningShared<T>>();
  if (pairs.flags->not_finite) return;
  const AnchorRow<T> row = anchor_row<T>(pairs, stripe, blockIdx.x);
  const bool nearest_positive = strategies.positive == Strategy::easy, nearest_negative = strategies.negative != Strategy::easy;
  const T none = T(-1), all = infinity<T>();
  Best<T, true> positive, negative;
  if (strategies.positive == Strategy::semihard) {
    negative = choose<false>(row, nearest_negative, none, all, shared);
    positive = choose<true>(row, false, none, negative.index == kNobody ? none : negative.value, shared);
  } else {
    positive = choose<true>(row, nearest_positive, none, all, shared);
    const bool semi_hard = strategies.negative == Strategy::semihard && positive.index != kNobody;
    negative = choose<false>(row, nearest_negative, semi_hard ? positive.value : none, all, shared);
  }
  if (threadIdx.x != 0) return;
  const int64_t a = stripe.first + blockIdx.x, anchors = pairs.anchors.count;
  T* values = static_cast<T*>(found.values);
  values[a] = positive.value;
  values[anchors + a] = negative.value;
  found.indices[a] = positive.index;
  found.indices[anchors + a] = negative.index;
}

}  // namespace

void mine_rows(const Pairs& pairs, const Stripe& stripe, const Strategies& strategies, const DirectFound& found, void* stream) {
  dispatch_compute(pairs.storage, [&](auto t) {
    using T = decltype(t);
    launch(mine_rows_kernel<T>, stripe.rows, kBlockThreads, sizeof(MiningShared<T>), stream, pairs, stripe, strategies, found);
  });
}

}  // namespace deepsim::cuda
