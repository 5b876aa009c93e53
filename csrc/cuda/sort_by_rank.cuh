// A stable sort of numbers by counting, for each, how many come before it: N^2 comparisons, which up to some ten thousand numbers take
// less than the two dozen launches of a radix sort.
#pragma once

#include "warp.cuh"

namespace deepsim::cuda {

constexpr int kRankThreads = 256;
// That a block compares its own with; so many blocks share a number that a few thousand numbers fill a large GPU.
constexpr int kRankOthers = 512;

template <class T>
struct RankShared {
  T other[kRankOthers];
  int32_t narrow[kRankOthers];  // the same, where 32 bits are enough
  int wide;                     // whether they are not
};

// How many of the first `before` others are not greater, and of the rest are less.
template <class T>
__device__ __forceinline__ int32_t rank_among(const T* other, int others, int before, T number) {
  int32_t rank = 0;
#pragma unroll 8
  for (int k = 0; k < before; ++k) rank += other[k] <= number;
#pragma unroll 8
  for (int k = before; k < others; ++k) rank += other[k] < number;
  return rank;
}

// ranks[i] += how many of some others come before number i: a block for each kRankThreads numbers and kRankOthers others.
template <class T>
__global__ void __launch_bounds__(kRankThreads) rank_kernel(const T* numbers, int64_t count, int32_t* ranks) {
  auto& shared = shared_memory<RankShared<T>>();
  const int64_t own_blocks = (count + kRankThreads - 1) / kRankThreads;
  const int64_t i = blockIdx.x % own_blocks * kRankThreads + threadIdx.x, first = blockIdx.x / own_blocks * kRankOthers;
  const int others = int(count - first < kRankOthers ? count - first : kRankOthers);
  if (threadIdx.x == 0) shared.wide = 0;
  __syncthreads();
  const T number = i < count ? numbers[i] : T(0);
  bool wide = int32_t(number) != number;
  for (int k = int(threadIdx.x); k < others; k += kRankThreads) {
    const T other = numbers[first + k];
    wide |= int32_t(other) != other;
    shared.other[k] = other;
    shared.narrow[k] = int32_t(other);
  }
  if (wide) atomicOr(&shared.wide, 1);
  __syncthreads();
  if (i >= count) return;
  // Equal ones come before if they stand before.
  const int before = int(i <= first ? 0 : i - first < others ? i - first : others);
  const int32_t rank = shared.wide ? rank_among(shared.other, others, before, number)
                                   : rank_among(shared.narrow, others, before, int32_t(number));
  atomicAdd(&ranks[i], rank);
}

// Puts every number where it belongs.
template <class T>
__global__ void __launch_bounds__(kRankThreads) place_kernel(const T* numbers, int64_t count, const int32_t* ranks, T* sorted,
                                                             int64_t* order) {
  const int64_t i = int64_t(blockIdx.x) * kRankThreads + threadIdx.x;
  if (i >= count) return;
  sorted[ranks[i]] = numbers[i];
  order[ranks[i]] = i;
}

}  // namespace deepsim::cuda
