// What the threads of a block find out together: sums, the best of many, a sorted list.
#pragma once

#include "batch_hard.h"
#include "warp.cuh"

namespace deepsim::cuda {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;

// The better of two candidates: by value, then the lower index.
template <class T, bool kLargest>
struct Best {
  T value = kLargest ? -infinity<T>() : infinity<T>();
  int32_t index = kNobody;

  __device__ __forceinline__ void improve(T v, int32_t i) {
    const bool better = kLargest ? v > value : v < value;
    if (better || (v == value && i < index)) {
      value = v;
      index = i;
    }
  }

  // The best of the warp, in all lanes.
  __device__ __forceinline__ void improve_by_lanes() {
    for (int bits = kWarp / 2; bits > 0; bits /= 2) {
      const T v = __shfl_xor_sync(kAllLanes, value, bits);
      improve(v, __shfl_xor_sync(kAllLanes, index, bits));
    }
  }
};

// The best of the block, in all threads.
template <class T, bool kLargest>
__device__ __forceinline__ Best<T, kLargest> block_best(Best<T, kLargest> best, T (&values)[kBlockWarps],
                                                        int32_t (&indices)[kBlockWarps]) {
  best.improve_by_lanes();
  __syncthreads();  // nobody reads what was there before
  if (lane_index() == 0) {
    values[threadIdx.x / kWarp] = best.value;
    indices[threadIdx.x / kWarp] = best.index;
  }
  __syncthreads();
  for (int w = 0; w < kBlockWarps; ++w) best.improve(values[w], indices[w]);
  return best;
}

// The sum over the block, the same in all threads, in a fixed order.
template <class T>
__device__ __forceinline__ T block_sum(T v, T (&scratch)[kBlockWarps]) {
  v = warp_sum(v);
  __syncthreads();
  if (lane_index() == 0) scratch[threadIdx.x / kWarp] = v;
  __syncthreads();
  T sum = 0;
  for (int w = 0; w < kBlockWarps; ++w) sum += scratch[w];
  return sum;
}

// values[i] becomes the sum of values[i], values[i + 1], ... values[count - 1].
template <int kMost>
__device__ __forceinline__ void suffix_sums(int32_t (&values)[kMost], int count) {
  static_assert(kMost % kBlockThreads == 0);
  for (int step = 1; step < count; step *= 2) {
    int32_t add[kMost / kBlockThreads];
#pragma unroll
    for (int e = 0; e < kMost / kBlockThreads; ++e) {
      const int i = int(threadIdx.x) + e * kBlockThreads + step;
      add[e] = i < count ? values[i] : 0;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kMost / kBlockThreads; ++e) {
      const int i = int(threadIdx.x) + e * kBlockThreads;
      if (i < count) values[i] += add[e];
    }
    __syncthreads();
  }
}

__device__ __forceinline__ int next_power_of_two(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

// Sorts by value, equal ones by index, ascending either or with the largest value first: a bitonic network over the next power of two,
// up to which both arrays are overwritten. Begins and ends with a barrier.
template <bool kLargestFirst, class T>
__device__ __forceinline__ void sort_by_value(T* values, int32_t* indices, int count) {
  const int size = next_power_of_two(count);
  for (int i = count + int(threadIdx.x); i < size; i += kBlockThreads) {
    values[i] = kLargestFirst ? -infinity<T>() : infinity<T>();
    indices[i] = kNobody;
  }
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int pair = int(threadIdx.x); pair < size / 2; pair += kBlockThreads) {
        const int i = 2 * pair - (pair & (step - 1)), j = i + step;
        const T a = values[i], b = values[j];
        const int32_t ia = indices[i], ib = indices[j];
        const bool second_first = (kLargestFirst ? b > a : b < a) || (a == b && ib < ia);
        if (second_first == ((i & run) == 0)) {
          values[i] = b;
          values[j] = a;
          indices[i] = ib;
          indices[j] = ia;
        }
      }
      __syncthreads();
    }
  }
}

// How many elements at the beginning of a list fulfil `is_before`, which holds for none behind the first for which it does not.
template <class T, class IsBefore>
__device__ __forceinline__ int count_before(const T* list, int count, IsBefore is_before) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (is_before(list[middle])) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The bits of a distance, in the order of distances: none is negative.
__device__ __forceinline__ uint32_t distance_bits(float d) { return __float_as_uint(d); }
__device__ __forceinline__ unsigned long long distance_bits(double d) { return (unsigned long long)__double_as_longlong(d); }

}  // namespace deepsim::cuda
