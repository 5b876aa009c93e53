// What a row kernel sees: one anchor's distances to all references, and its positives sorted.
#pragma once

#include "all_pairs.h"
#include "block.cuh"
#include "strength.cuh"

namespace deepsim::cuda {

// What a row kernel reads of a column.
template <class T>
struct Column {
  T distance;
  int64_t label;    // of the reference
  float half_norm;  // likewise, where the row has them
};

// One anchor's row of a stripe and who stands where in it.
template <class T>
struct AnchorRow {
  T* distance;
  const int64_t* labels;        // of the references
  int64_t label, own, columns;  // own: the anchor's own column, or -1
  // What distances pull with; null where no gradient is wanted.
  Distance kind;
  T *strength, *single_strength;
  uint32_t* single;
  float half_norm;
  const float* half_norms;  // of the references; null where no pair that pulls is too close for products

  __device__ __forceinline__ Column<T> column(int64_t c) const { return {distance[c], labels[c], half_norms ? half_norms[c] : 0}; }

  __device__ __forceinline__ bool is_positive(int64_t c, const Column<T>& column) const { return column.label == label && c != own; }
  __device__ __forceinline__ bool is_negative(const Column<T>& column) const { return column.label != label; }

  // The distance of column c has weight w in the loss. Returns the strength if the pair pulls together with all others.
  __device__ __forceinline__ T pull(int64_t c, const Column<T>& column, T w) const {
    const T d = column.distance, s = deepsim::cuda::strength(kind, d, w);
    const bool by_itself = s != 0 && half_norms && is_close(float(half_square_of_distance(kind, d)), half_norm, column.half_norm);
    if (by_itself) pull_singly(c, s);
    return strength[c] = by_itself ? T(0) : s;
  }

  // With strength s, more than once if need be. The distance may be gone then.
  __device__ __forceinline__ void pull_singly(int64_t c, T s) const {
    if (s == 0) return;
    const uint32_t bit = 1u << c % 32;
    const bool again = atomicOr(&single[c / 32], bit) & bit;
    single_strength[c] = again ? single_strength[c] + s : s;
  }
};

template <class T>
__device__ __forceinline__ AnchorRow<T> anchor_row(const Pairs& pairs, const Stripe& stripe, int64_t row) {
  const int64_t anchor = stripe.first + row, at = row * stripe.stride;
  const auto of_row = [at](void* of) { return of ? static_cast<T*>(of) + at : nullptr; };
  AnchorRow<T> r;
  r.distance = of_row(stripe.distances);
  r.labels = pairs.reference_labels;
  r.label = pairs.labels ? pairs.labels[anchor] : 0;
  r.own = pairs.self_form ? anchor : -1;
  r.columns = pairs.references.count;
  r.kind = pairs.distance;
  r.strength = of_row(stripe.strengths);
  r.single_strength = of_row(stripe.single_strengths);
  r.single = stripe.single ? stripe.single + at / 32 : nullptr;
  r.half_norm = pairs.centred_anchors.rows ? pairs.centred_anchors.half_norm[anchor] : 0;
  r.half_norms = pairs.centred_references.rows && stripe.strengths ? pairs.centred_references.half_norm : nullptr;
  return r;
}

// Calls visit(c, column) for this thread's columns of [begin, end), in ascending order. It has four of them on their way at once: a visit
// branches and stores, and loads behind that would each wait for the one before.
template <class T, class Visit>
__device__ __forceinline__ void for_columns(const AnchorRow<T>& row, int64_t begin, int64_t end, Visit visit) {
  constexpr int kAtOnce = 4;
  for (int64_t first = begin + threadIdx.x; first < end; first += kAtOnce * kBlockThreads) {
    Column<T> columns[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kBlockThreads < end) columns[i] = row.column(first + i * kBlockThreads);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kBlockThreads < end) visit(first + i * kBlockThreads, columns[i]);
    }
  }
}

template <class T, class Visit>
__device__ __forceinline__ void for_columns(const AnchorRow<T>& row, Visit visit) {
  for_columns(row, 0, row.columns, visit);
}

// An anchor's positives, a part of them at a time, the farthest first.
constexpr int kMostPositives = 2048;
constexpr int kCollectedColumns = 1024;  // looked through between two looks at how many there are

template <class T>
struct SortedPositives {
  T distance[kMostPositives];
  int32_t index[kMostPositives];
  int32_t count;
};

// Those from column `cursor` on; returns the column to go on from, if need be. Which columns come together depends on the labels alone.
// Begins and ends with a barrier.
template <class T>
__device__ __forceinline__ int64_t collect_positives(const AnchorRow<T>& row, int64_t cursor, SortedPositives<T>& out) {
  __syncthreads();
  if (threadIdx.x == 0) out.count = 0;
  __syncthreads();
  int found = 0;
  while (cursor < row.columns && found + kCollectedColumns <= kMostPositives) {
    const int64_t end = cursor + kCollectedColumns < row.columns ? cursor + kCollectedColumns : row.columns;
    for_columns(row, cursor, end, [&](int64_t c, const Column<T>& column) {
      if (!row.is_positive(c, column)) return;
      const int slot = atomicAdd(&out.count, 1);
      out.distance[slot] = column.distance;
      out.index[slot] = int32_t(c);
    });
    cursor = end;
    __syncthreads();
    found = out.count;
    __syncthreads();
  }
  sort_by_value<true>(out.distance, out.index, found);
  return cursor;
}

}  // namespace deepsim::cuda
