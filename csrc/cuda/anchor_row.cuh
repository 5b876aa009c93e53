// What a row kernel sees: one anchor's distances to all references, and its positives sorted.
#pragma once

#include "all_pairs.h"
#include "block.cuh"

namespace deepsim::cuda {

// One anchor's row of a stripe and who stands where in it.
template <class T>
struct AnchorRow {
  const T* distance;
  T* strength;             // null where no gradient is wanted
  const int64_t* labels;   // of the references
  int64_t label, own, columns;  // own: the anchor's own column, or -1

  __device__ __forceinline__ bool is_positive(int64_t c) const { return labels[c] == label && c != own; }
  __device__ __forceinline__ bool is_negative(int64_t c) const { return labels[c] != label; }
};

template <class T>
__device__ __forceinline__ AnchorRow<T> anchor_row(const Batch& batch, const Stripe& stripe, int64_t row) {
  const int64_t anchor = stripe.first + row, at = row * stripe.stride;
  return {static_cast<const T*>(stripe.distances) + at,
          stripe.strengths ? static_cast<T*>(stripe.strengths) + at : nullptr,
          batch.reference_labels,
          batch.labels ? batch.labels[anchor] : 0,
          batch.self_form ? anchor : -1,
          batch.references.count};
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
    for (int64_t c = cursor + threadIdx.x; c < end; c += kBlockThreads) {
      if (!row.is_positive(c)) continue;
      const int slot = atomicAdd(&out.count, 1);
      out.distance[slot] = row.distance[c];
      out.index[slot] = int32_t(c);
    }
    cursor = end;
    __syncthreads();
    found = out.count;
    __syncthreads();
  }
  sort_by_value<true>(out.distance, out.index, found);
  return cursor;
}

}  // namespace deepsim::cuda
