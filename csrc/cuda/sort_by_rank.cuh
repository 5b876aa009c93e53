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
};

// ranks[i] += how many of some others come before number i: a block for each kRankThreads numbers and kRankOthers others.
template <class T>
__global__ void __launch_bounds__(kRankThreads) rank_kernel(const T* numbers, int64_t count, int32_t* ranks) {
  auto& shared = shared_memory<RankShared<T>>();
  const int64_t own_blocks = (count + kRankThreads - 1) / kRankThreads;
  const int64_t i = blockIdx.x % own_blocks * kRankThreads + threadIdx.x, first = blockIdx.x / own_blocks * kRankOthers;
  const int others = int(count - first < kRankOthers ? count - first : kRankOthers);
  for (int k = int(threadIdx.x); k < others; k += kRankThreads) shared.other[k] = numbers[first + k];
  __syncthreads();
  if (i >= count) return;
  const T number = numbers[i];
  // Equal ones come before if they stand before.
  const int before = int(i <= first ? 0 : i - first < others ? i - first : others);
  int32_t rank = 0;
#pragma unroll 4
  for (int k = 0; k < before; ++k) rank += shared.other[k] <= number;
#pragma unroll 4
  for (int k = before; k < others; ++k) rank += shared.other[k] < number;
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
