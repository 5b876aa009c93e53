// Semi-hard triplet loss on CUDA: one anchor's triplets from its distances.
//
// Positives stand sorted, the farthest first. A negative is noted by the farthest positive that it is farther than, if it is the nearest
// of those; the nearest negative noted by a positive or one before it is then the positive's. The order of the search never matters: the
// better distance wins, then the lower index. Two pairs for each positive have a weight in the loss: they pull by themselves.
#include "anchor_row.cuh"
#include "dispatch.cuh"
#include "row_sums.cuh"

namespace deepsim::cuda {
namespace {

// The bits of double(distance), see block.cuh.
constexpr unsigned long long kNoDistance = ~0ull;

template <class T>
struct SemiHardShared {
  SortedPositives<T> positives;
  unsigned long long nearest[kMostPositives];
  int32_t nearest_index[kMostPositives];
  T best[kBlockWarps];
  int32_t best_index[kBlockWarps];
  RowSumsShared sums;
};

// Element i becomes the best of the elements up to i: by distance, then by index.
template <int kMost>
__device__ __forceinline__ void prefix_nearest(unsigned long long (&nearest)[kMost], int32_t (&index)[kMost], int count) {
  for (int step = 1; step < count; step *= 2) {
    unsigned long long before[kMost / kBlockThreads];
    int32_t before_index[kMost / kBlockThreads];
#pragma unroll
    for (int e = 0; e < kMost / kBlockThreads; ++e) {
      const int i = int(threadIdx.x) + e * kBlockThreads - step;
      const bool inside = i >= 0 && i + step < count;
      before[e] = inside ? nearest[i] : kNoDistance;
      before_index[e] = inside ? index[i] : kNobody;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kMost / kBlockThreads; ++e) {
      const int i = int(threadIdx.x) + e * kBlockThreads;
      if (i >= count || before[e] > nearest[i] || (before[e] == nearest[i] && before_index[e] >= index[i])) continue;
      nearest[i] = before[e];
      index[i] = before_index[e];
    }
    __syncthreads();
  }
}

// Every negative at the farthest positive that it is farther than: the smallest distance, then the lowest index that has it. Ends with a
// barrier.
template <bool kIndices, class T>
__device__ __forceinline__ void note_negatives(const AnchorRow<T>& row, SemiHardShared<T>& shared, int count) {
  for_columns(row, [&](int64_t c, const Column<T>& column) {
    if (!row.is_negative(column)) return;
    const T d = column.distance;
    const int s = count_before(shared.positives.distance, count, [=](T p) { return p >= d; });
    if (s == count) return;
    const unsigned long long bits = distance_bits(double(d));
    if (!kIndices) {
      if (bits < ptx::load_relaxed_shared(&shared.nearest[s])) atomicMin(&shared.nearest[s], bits);  // few are, and atomics wait
    } else if (bits == shared.nearest[s]) {
      atomicMin(&shared.nearest_index[s], int32_t(c));
    }
  });
  __syncthreads();
}

// Nobody is farther than the farthest positives: they take the farthest negative.
template <class T>
__device__ __forceinline__ int32_t negative_of(const SemiHardShared<T>& shared, int s, int32_t farthest) {
  return shared.nearest_index[s] == kNobody ? farthest : shared.nearest_index[s];
}

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2) semi_hard_rows_kernel(Pairs pairs, Stripe stripe, TripletLoss<T> loss,
                                                                          RowSums* sums) {
  auto& shared = shared_memory<SemiHardShared<T>>();
  if (pairs.flags->not_finite) return;
  const AnchorRow<T> row = anchor_row<T>(pairs, stripe, blockIdx.x);
  const T* positive = shared.positives.distance;
  Best<T, true> farthest;
  for_columns(row, [&](int64_t c, const Column<T>& column) {
    if (row.is_negative(column)) farthest.improve(column.distance, int32_t(c));
  });
  farthest = block_best(farthest, shared.best, shared.best_index);
  const bool has_negative = farthest.index != kNobody;

  RowSums own = {};
  bool has_positive = false, first = true;
  for (int64_t cursor = 0; first || cursor < row.columns; first = false) {
    cursor = collect_positives(row, cursor, shared.positives);
    const int count = shared.positives.count;
    has_positive = has_positive || count > 0;
    if (count == 0 || !has_negative) continue;
    for (int s = int(threadIdx.x); s < count; s += kBlockThreads) {
      shared.nearest[s] = kNoDistance;
      shared.nearest_index[s] = kNobody;
    }
    __syncthreads();
    note_negatives<false>(row, shared, count);
    note_negatives<true>(row, shared, count);
    prefix_nearest(shared.nearest, shared.nearest_index, count);

    for (int s = int(threadIdx.x); s < count; s += kBlockThreads) {
      const int32_t negative = negative_of(shared, s, farthest.index);
      const T d_ap = positive[s], d_an = row.distance[negative], value = loss.value(d_ap, d_an);
      own.values[0] += double(value);
      own.values[1] += double(d_ap);
      own.values[2] += double(d_an);
      ++own.counts[1];
      own.counts[2] += value > 0;
      if (!row.single) continue;
      row.pull_singly(shared.positives.index[s], strength(row.kind, d_ap, loss.derivative(d_ap, d_an)));
      // Positives with the same negative follow each other. The first of them adds up for all.
      if (s > 0 && negative_of(shared, s - 1, farthest.index) == negative) continue;
      T weight = 0;
      for (int r = s; r < count && negative_of(shared, r, farthest.index) == negative; ++r) weight -= loss.derivative(positive[r], d_an);
      row.pull_singly(negative, strength(row.kind, d_an, weight));
    }
  }
  if (threadIdx.x == 0) own.counts[0] = has_positive && has_negative;
  store_sums(own, shared.sums, sums[stripe.first + blockIdx.x]);
}

}  // namespace

void semi_hard_rows(const Pairs& pairs, const Stripe& stripe, const NextFarther& options, RowSums* sums, void* stream) {
  dispatch_compute(pairs.storage, [&](auto t) {
    using T = decltype(t);
    launch(semi_hard_rows_kernel<T>, stripe.rows, kBlockThreads, sizeof(SemiHardShared<T>), stream, pairs, stripe,
           TripletLoss<T>{T(options.margin), options.soft}, sums);
  });
}

}  // namespace deepsim::cuda
