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
  for_columns(row, [&](int64_t c, const Column<T>& column) {
    if (!row.is_negative(column)) {
      if (row.strength) row.strength[c] = 0;
      return;
    }
    const T d = column.distance;
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
    if (row.strength) pulled += row.pull(c, column, T(-run));
  });
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
  for_columns(row, [&](int64_t c, const Column<T>& column) {
    if (first && row.strength) row.strength[c] = 0;
    if (!row.is_negative(column)) return;
    const T d = column.distance;
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
    if (end <= begin) return;
    sums.active += end - begin;
    sums.active_d_an += double(end - begin) * double(d);
    atomicAdd(&shared.active[end - 1], 1);
    if (begin > 0) atomicAdd(&shared.active[begin - 1], -1);
    if (row.strength) row.strength[c] -= T(end - begin);
  });
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
        pulled += row.pull(c, row.column(c), T(shared.active[s]));
      } else {
        row.strength[c] = T(shared.active[s]);
      }
    }
  }
  if (row.strength && !few) {
    __syncthreads();
    for_columns(row, [&](int64_t c, const Column<T>& column) { pulled += row.pull(c, column, row.strength[c]); });
  }
  store_strength_sum(pulled, stripe, shared.sums);

  // Of all threads, then what depends on all positives and all negatives of the anchor.
  RowSums row_sums = {{limits - negatives.active_d_an, positive_sum, negatives.d_an, 0},
                      {positives, negatives.count, negatives.active, negatives.runs}};
  if (window.semi_hard) {
    // Triplets without a loss have d_ap = d_an - margin.
    row_sums.values[1] = active_d_ap + negatives.runs_d_an - negatives.active_d_an -
                         double(negatives.runs - negatives.active) * window.exact_margin;
    row_sums.values[2] = negatives.runs_d_an;
  }
  row_sums = block_sums(row_sums, shared.sums);
  if (threadIdx.x != 0) return;
  const auto [all_positives, all_negatives, active, runs] = row_sums.counts;
  if (!window.semi_hard) {
    row_sums.values[1] *= double(all_negatives);
    row_sums.values[2] *= double(all_positives);
  }
  const int64_t triplets = window.semi_hard ? runs : all_positives * all_negatives;
  sums[stripe.first + blockIdx.x] = {{row_sums.values[0], row_sums.values[1], row_sums.values[2], 0},
                                     {all_positives > 0 && all_negatives > 0, triplets, active, 0}};
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
