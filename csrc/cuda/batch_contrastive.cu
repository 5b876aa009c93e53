// Contrastive loss of all pairs on CUDA: one anchor's pairs from its distances.
#include "anchor_row.cuh"
#include "dispatch.cuh"
#include "pull.cuh"
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
__device__ __forceinline__ T add_pair(RowSums& sums, T d, T beyond, bool squared, const double* scales) {
  sums.values[2 + kSide] += double(d);
  ++sums.counts[kSide];
  if (!(beyond > 0)) return T(0);
  sums.values[kSide] += squared ? double(beyond) * double(beyond) : double(beyond);
  ++sums.counts[2 + kSide];
  return (squared ? 2 * beyond : T(1)) * (scales ? T(scales[kSide]) : T(1));
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) contrastive_rows_kernel(Batch batch, Stripe stripe, Margins<T> margins,
                                                                            const double* scales, RowSums* sums) {
  auto& shared = shared_memory<RowSumsShared>();
  if (batch.flags->not_finite) return;
  const AnchorRow<T> row = anchor_row<T>(batch, stripe, blockIdx.x);
  RowSums own = {};
  for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) {
    const T d = row.distance[c];
    T weight = 0;
    if (row.is_negative(c)) {
      weight = -add_pair<1>(own, d, margins.negative - d, margins.squared, scales);
    } else if (c != row.own) {
      weight = add_pair<0>(own, d, d - margins.positive, margins.squared, scales);
    }
    if (row.strength) row.strength[c] = strength(batch.distance, d, weight);
  }
  store_sums(own, shared, sums[stripe.first + blockIdx.x]);
}

}  // namespace

void contrastive_rows(const Batch& batch, const Stripe& stripe, const PairMargins& margins, const double* scales, RowSums* sums,
                      void* stream) {
  dispatch_compute(batch.storage, [&](auto t) {
    using T = decltype(t);
    launch(contrastive_rows_kernel<T>, stripe.rows, kBlockThreads, sizeof(RowSumsShared), stream, batch, stripe,
           Margins<T>{T(margins.positive), comparable_margin<T>(margins.negative), margins.squared}, scales, sums);
  });
}

}  // namespace deepsim::cuda
