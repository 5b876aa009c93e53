// Batch-all triplet loss on CUDA: one anchor's triplets from its distances.
//
// A negative at distance d is active with the positives p for which d_ap + margin > d. Positives stand sorted, the farthest first, so
// these are a run of the list that two binary searches find; where runs end is counted for each positive, and sums from the end of the
// list on say how often it is active.
#include "anchor_row.cuh"
#include "dispatch.cuh"
#include "pull.cuh"
#include "row_sums.cuh"

namespace deepsim::cuda {
namespace {

template <class T>
struct BatchAllShared {
  SortedPositives<T> positives;
  int32_t active[kMostPositives];
  RowSumsShared sums;
};

template <class T>
struct Window {
  T margin;
  double exact_margin;
  bool semi_hard;
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) batch_all_rows_kernel(Batch batch, Stripe stripe, Window<T> window, RowSums* sums) {
  auto& shared = shared_memory<BatchAllShared<T>>();
  if (batch.flags->not_finite) return;
  const AnchorRow<T> row = anchor_row<T>(batch, stripe, blockIdx.x);
  const T margin = window.margin;
  const T* positive = shared.positives.distance;
  // Of this thread: how many, and the sums of their distances. `runs` are pairs of a negative and a positive that make a triplet.
  int64_t positives = 0, negatives = 0, active = 0, runs = 0;
  double limits = 0, positive_sum = 0, negative_sum = 0, active_d_ap = 0, active_d_an = 0, runs_d_an = 0;

  bool first = true;
  for (int64_t cursor = 0; first || cursor < row.columns; first = false) {
    cursor = collect_positives(row, cursor, shared.positives);
    const int count = shared.positives.count;
    for (int s = int(threadIdx.x); s < count; s += kBlockThreads) shared.active[s] = 0;
    __syncthreads();
    for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) {
      // Strengths first count, without a sign that a comparison of distances would not see: that of negatives is below 0.
      if (first && row.strength) row.strength[c] = 0;
      if (!row.is_negative(c)) continue;
      const T d = row.distance[c];
      if (first) {
        ++negatives;
        negative_sum += double(d);
      }
      const int end = count_before(positive, count, [=](T p) { return p + margin > d; });
      int begin = 0;
      if (window.semi_hard) {
        begin = count_before(positive, count, [=](T p) { return p >= d; });
        const int within = count_before(positive, count, [=](T p) { return p + margin >= d; }) - begin;
        runs += within;
        runs_d_an += double(within) * double(d);
      }
      if (end <= begin) continue;
      active += end - begin;
      active_d_an += double(end - begin) * double(d);
      atomicAdd(&shared.active[end - 1], 1);
      if (begin > 0) atomicAdd(&shared.active[begin - 1], -1);
      if (row.strength) row.strength[c] -= T(end - begin);
    }
    __syncthreads();
    suffix_sums(shared.active, count);
    for (int s = int(threadIdx.x); s < count; s += kBlockThreads) {
      const double d = double(positive[s]), n = double(shared.active[s]);
      ++positives;
      positive_sum += d;
      active_d_ap += n * d;
      limits += n * (d + window.exact_margin);
      if (row.strength) row.strength[shared.positives.index[s]] = T(shared.active[s]);
    }
  }
  if (row.strength) {
    __syncthreads();
    for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) {
      row.strength[c] = strength(batch.distance, row.distance[c], row.strength[c]);
    }
  }

  // What depends on all positives and all negatives of the anchor is worked out once, by the first thread.
  positives = block_sum(positives, shared.sums.counts);
  negatives = block_sum(negatives, shared.sums.counts);
  RowSums own = {{limits - active_d_an, 0, 0, 0}, {0, 0, active, 0}};
  if (window.semi_hard) {
    // Triplets without a loss have d_ap = d_an - margin.
    own.values[1] = active_d_ap + runs_d_an - active_d_an - double(runs - active) * window.exact_margin;
    own.values[2] = runs_d_an;
    own.counts[1] = runs;
  } else {
    own.values[1] = positive_sum * double(negatives);
    own.values[2] = negative_sum * double(positives);
    if (threadIdx.x == 0) own.counts[1] = positives * negatives;
  }
  if (threadIdx.x == 0) own.counts[0] = positives > 0 && negatives > 0;
  store_sums(own, shared.sums, sums[stripe.first + blockIdx.x]);
}

}  // namespace

void batch_all_rows(const Batch& batch, const Stripe& stripe, const TripletWindow& window, RowSums* sums, void* stream) {
  dispatch_compute(batch.storage, [&](auto t) {
    using T = decltype(t);
    launch(batch_all_rows_kernel<T>, stripe.rows, kBlockThreads, sizeof(BatchAllShared<T>), stream, batch, stripe,
           Window<T>{comparable_margin<T>(window.margin), window.margin, window.semi_hard}, sums);
  });
}

}  // namespace deepsim::cuda
