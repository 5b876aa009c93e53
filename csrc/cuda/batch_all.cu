// Batch-all triplet loss on CUDA: one anchor's triplets from its distances.
//
// A negative at distance d is active with the positives p for which d_ap + margin > d. Positives stand sorted, the farthest first, so
// these are a run of the list. Few positives are compared one by one; with many, two binary searches find the run, where runs end is
// counted for each positive, and sums from the end of the list on say how often it is active.
#include "anchor_row.cuh"
#include "dispatch.cuh"
#include "row_sums.cuh"

namespace deepsim::cuda {
namespace {

constexpr int kFewPositives = 8;

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

// Of a thread's negatives: how many, and the sums of their distances. `runs` are pairs of a negative and a positive that make a triplet of
// the window.
struct NegativeSums {
  int64_t count = 0, active = 0, runs = 0;
  double d_an = 0, active_d_an = 0, runs_d_an = 0;
};

// Every negative with every positive; counts stay in registers. Also leaves what negatives pull with, and returns the sum of it.
template <class T>
__device__ __forceinline__ T compare_with_few(const AnchorRow<T>& row, BatchAllShared<T>& shared, T margin, NegativeSums& sums) {
  T limit[kFewPositives], pulled = 0;
  int active[kFewPositives];
  for (int p = 0; p < kFewPositives; ++p) {
    limit[p] = p < shared.positives.count ? shared.positives.distance[p] + margin : -infinity<T>();
    active[p] = 0;
  }
  for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) {
    if (!row.is_negative(c)) {
      if (row.strength) row.strength[c] = 0;
      continue;
    }
    const T d = row.distance[c];
    int run = 0;
#pragma unroll
    for (int p = 0; p < kFewPositives; ++p) {
      active[p] += limit[p] > d;
      run += limit[p] > d;
    }
    ++sums.count;
    sums.d_an += double(d);
    sums.active += run;
    sums.active_d_an += double(run) * double(d);
    if (row.strength) pulled += row.pull(c, T(-run));
  }
  for (int p = 0; p < kFewPositives; ++p) {
    const int sum = warp_sum(active[p]);
    if (lane_index() == 0 && sum != 0) atomicAdd(&shared.active[p], sum);
  }
  __syncthreads();
  return pulled;
}

// Every negative with the positives that are listed at the moment. Leaves in the place of strengths how often negatives are active: as a
// number below 0, so that a 0 has no sign.
template <class T>
__device__ __forceinline__ void search_among_many(const AnchorRow<T>& row, BatchAllShared<T>& shared, const Window<T>& window, bool first,
                                                  NegativeSums& sums) {
  const T margin = window.margin;
  const T* positive = shared.positives.distance;
  const int count = shared.positives.count;
  for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) {
    if (first && row.strength) row.strength[c] = 0;
    if (!row.is_negative(c)) continue;
    const T d = row.distance[c];
    if (first) {
      ++sums.count;
      sums.d_an += double(d);
    }
    const int end = count_before(positive, count, [=](T p) { return p + margin > d; });
    int begin = 0;
    if (window.semi_hard) {
      begin = count_before(positive, count, [=](T p) { return p >= d; });
      const int within = count_before(positive, count, [=](T p) { return p + margin >= d; }) - begin;
      sums.runs += within;
      sums.runs_d_an += double(within) * double(d);
    }
    if (end <= begin) continue;
    sums.active += end - begin;
    sums.active_d_an += double(end - begin) * double(d);
    atomicAdd(&shared.active[end - 1], 1);
    if (begin > 0) atomicAdd(&shared.active[begin - 1], -1);
    if (row.strength) row.strength[c] -= T(end - begin);
  }
  __syncthreads();
  suffix_sums(shared.active, count);
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) batch_all_rows_kernel(Pairs pairs, Stripe stripe, Window<T> window, RowSums* sums) {
  auto& shared = shared_memory<BatchAllShared<T>>();
  if (pairs.flags->not_finite) return;
  const AnchorRow<T> row = anchor_row<T>(pairs, stripe, blockIdx.x);
  // Of this thread.
  NegativeSums negatives;
  int64_t positives = 0;
  double limits = 0, positive_sum = 0, active_d_ap = 0;
  T pulled = 0;

  bool first = true, few = false;
  for (int64_t cursor = 0; first || cursor < row.columns; first = false) {
    cursor = collect_positives(row, cursor, shared.positives);
    const int count = shared.positives.count;
    for (int s = int(threadIdx.x); s < count; s += kBlockThreads) shared.active[s] = 0;
    __syncthreads();
    few = first && cursor >= row.columns && count <= kFewPositives && !window.semi_hard;
    if (few) {
      pulled += compare_with_few(row, shared, window.margin, negatives);
    } else {
      search_among_many(row, shared, window, first, negatives);
    }
    for (int s = int(threadIdx.x); s < count; s += kBlockThreads) {
      const double d = double(shared.positives.distance[s]), n = double(shared.active[s]);
      ++positives;
      positive_sum += d;
      active_d_ap += n * d;
      limits += n * (d + window.exact_margin);
      if (!row.strength) continue;
      const int64_t c = shared.positives.index[s];
      if (few) {
        pulled += row.pull(c, T(shared.active[s]));
      } else {
        row.strength[c] = T(shared.active[s]);
      }
    }
  }
  if (row.strength && !few) {
    __syncthreads();
    for (int64_t c = threadIdx.x; c < row.columns; c += kBlockThreads) pulled += row.pull(c, row.strength[c]);
  }
  store_strength_sum(pulled, stripe, shared.sums);

  // What depends on all positives and all negatives of the anchor is worked out once, by the first thread.
  positives = block_sum(positives, shared.sums.counts);
  const int64_t negative_count = block_sum(negatives.count, shared.sums.counts);
  RowSums own = {{limits - negatives.active_d_an, 0, 0, 0}, {0, 0, negatives.active, 0}};
  if (window.semi_hard) {
    // Triplets without a loss have d_ap = d_an - margin.
    own.values[1] = active_d_ap + negatives.runs_d_an - negatives.active_d_an -
                    double(negatives.runs - negatives.active) * window.exact_margin;
    own.values[2] = negatives.runs_d_an;
    own.counts[1] = negatives.runs;
  } else {
    own.values[1] = positive_sum * double(negative_count);
    own.values[2] = negatives.d_an * double(positives);
    if (threadIdx.x == 0) own.counts[1] = positives * negative_count;
  }
  if (threadIdx.x == 0) own.counts[0] = positives > 0 && negative_count > 0;
  store_sums(own, shared.sums, sums[stripe.first + blockIdx.x]);
}

}  // namespace

void batch_all_rows(const Pairs& pairs, const Stripe& stripe, const TripletWindow& window, RowSums* sums, void* stream) {
  dispatch_compute(pairs.storage, [&](auto t) {
    using T = decltype(t);
    launch(batch_all_rows_kernel<T>, stripe.rows, kBlockThreads, sizeof(BatchAllShared<T>), stream, pairs, stripe,
           Window<T>{comparable_margin<T>(window.margin), window.margin, window.semi_hard}, sums);
  });
}

}  // namespace deepsim::cuda
