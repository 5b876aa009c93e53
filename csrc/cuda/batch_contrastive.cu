// Contrastive loss of all pairs on CUDA: one anchor's pairs from its distances.
#include "anchor_row.cuh"
#include "dispatch.cuh"
#include "row_sums.cuh"

namespace deepsim::cuda {
namespace {

template <class T>
struct Margins {
  T positive, negative;
  bool squared;
};

// A pair of the positives (0) or of the negatives (1) whose distance is so far beyond its margin; returns the slope of its loss.
template <int kSide, class T>
__device__ __forceinline__ T add_pair(RowSums& sums, T d, T beyond, bool squared) {
  sums.values[2 + kSide] += double(d);
  ++sums.counts[kSide];
  if (!(beyond > 0)) return T(0);
  sums.values[kSide] += squared ? double(beyond) * double(beyond) : double(beyond);
  ++sums.counts[2 + kSide];
  return squared ? 2 * beyond : T(1);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) contrastive_rows_kernel(Pairs pairs, Stripe stripe, Margins<T> margins,
                                                                            const double* scales, RowSums* sums) {
  auto& shared = shared_memory<RowSumsShared>();
  if (pairs.flags->not_finite) return;
  const AnchorRow<T> row = anchor_row<T>(pairs, stripe, blockIdx.x);
  const T scale[2] = {scales ? T(scales[0]) : T(1), scales ? T(scales[1]) : T(1)};
  RowSums own = {};
  T pulled = 0;
  for_columns(row, [&](int64_t c, const Column<T>& column) {
    const T d = column.distance;
    T weight = 0;
    if (row.is_negative(column)) {
      weight = -scale[1] * add_pair<1>(own, d, margins.negative - d, margins.squared);
    } else if (c != row.own) {
      weight = scale[0] * add_pair<0>(own, d, d - margins.positive, margins.squared);
    }
    if (row.strength) pulled += row.pull(c, column, weight);
  });
  store_strength_sum(pulled, stripe, shared);
  store_sums(own, shared, sums[stripe.first + blockIdx.x]);
}

}  // namespace

void contrastive_rows(const Pairs& pairs, const Stripe& stripe, const PairMargins& margins, const double* scales, RowSums* sums,
                      void* stream) {
  dispatch_compute(pairs.storage, [&](auto t) {
    using T = decltype(t);
    launch(contrastive_rows_kernel<T>, stripe.rows, kBlockThreads, sizeof(RowSumsShared), stream, pairs, stripe,
           Margins<T>{T(margins.positive), comparable_margin<T>(margins.negative), margins.squared}, scales, sums);
  });
}

}  // namespace deepsim::cuda
