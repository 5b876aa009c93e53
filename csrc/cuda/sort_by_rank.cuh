// A stable sort in two launches, where a radix sort takes up to two dozen: the numbers of a run are sorted by counting, for each, how
// many of the run come before it; then each finds how many of every other run do, by halving, which tells its place.
#pragma once

#include "warp.cuh"

namespace deepsim::cuda {

// Numbers that are counted one by one. Runs half as long would be twice as many to look through.
constexpr int kRunLength = 512;
// Blocks share a run, so that a few thousand numbers are work for a large GPU.
constexpr int kRankThreads = 128;

template <class T>
struct RunShared {
  T number[kRunLength];
  int32_t narrow[kRunLength];  // the same, where 32 bits are enough
  int wide;                    // whether they are not
};

// How many of the first `before` numbers are not greater, and of the rest are less.
template <class T>
__device__ __forceinline__ int rank_among(const T* others, int count, int before, T number) {
  int rank = 0;
#pragma unroll 8
  for (int k = 0; k < before; ++k) rank += others[k] <= number;
#pragma unroll 8
  for (int k = before; k < count; ++k) rank += others[k] < number;
  return rank;
}

// Sorts each run: a block for kRankThreads of its numbers.
template <class T>
__global__ void __launch_bounds__(kRankThreads) sort_runs_kernel(const T* numbers, int64_t count, Runs<T> runs) {
  auto& shared = shared_memory<RunShared<T>>();
  const int64_t i = int64_t(blockIdx.x) * kRankThreads + threadIdx.x, first = int64_t(blockIdx.x) * kRankThreads / kRunLength * kRunLength;
  const int length = int(count - first < kRunLength ? count - first : kRunLength);
  if (threadIdx.x == 0) shared.wide = 0;
  __syncthreads();
  bool wide = false;
  for (int k = int(threadIdx.x); k < length; k += kRankThreads) {
    const T number = numbers[first + k];
    wide |= int32_t(number) != number;
    shared.number[k] = number;
    shared.narrow[k] = int32_t(number);
  }
  if (wide) atomicOr(&shared.wide, 1);
  __syncthreads();
  if (i >= count) return;
  const int own = int(i - first);  // equal ones come before if they stand before
  const T number = shared.number[own];
  const int rank = shared.wide ? rank_among(shared.number, length, own, number)
                               : rank_among(shared.narrow, length, own, shared.narrow[own]);
  runs.numbers[first + rank] = number;
  runs.order[first + rank] = int32_t(i);
}

// Lanes of a block of the second kernel are numbers, its warps share the runs. Neighbors in a run look at the same places.
constexpr int kMergeWarps = 8;
constexpr int kMergeThreads = kMergeWarps * kWarp;
// Runs that a thread looks through at once, as it waits for what it reads.
constexpr int kRunsAtOnce = 4;

struct MergeShared {
  int before[kMergeWarps][kWarp];
};

// Puts every number where it belongs.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_runs_kernel(Runs<T> runs, int count, T* sorted, int64_t* order) {
  auto& shared = shared_memory<MergeShared>();
  const int lane = lane_index(), warp = int(threadIdx.x) / kWarp, place = int(blockIdx.x) * kWarp + lane;
  const int own = place / kRunLength;  // the same for the whole block
  const T number = runs.numbers[place < count ? place : count - 1];
  int sum = 0;
  for (int first = warp; first * kRunLength < count; first += kMergeWarps * kRunsAtOnce) {
    int begin[kRunsAtOnce], end[kRunsAtOnce];  // what comes before is from begin on, and not beyond end
    for (int r = 0; r < kRunsAtOnce; ++r) {
      const int run = first + r * kMergeWarps;
      begin[r] = run * kRunLength;
      end[r] = run == own ? begin[r] : begin[r] + kRunLength < count ? begin[r] + kRunLength : count;
      sum -= begin[r];
    }
#pragma unroll
    for (int step = kRunLength; step > 0; step /= 2) {
      T other[kRunsAtOnce];
#pragma unroll
      for (int r = 0; r < kRunsAtOnce; ++r) {
        const int probe = begin[r] + step - 1;
        other[r] = runs.numbers[probe < count ? probe : count - 1];  // always something, so that none waits for another
      }
#pragma unroll
      for (int r = 0; r < kRunsAtOnce; ++r) {
        // Runs before the own stood before.
        const bool before = (other[r] < number) | ((other[r] == number) & (first + r * kMergeWarps < own));
        if (before & (begin[r] + step <= end[r])) begin[r] += step;
      }
    }
    for (int r = 0; r < kRunsAtOnce; ++r) sum += begin[r];
  }
  shared.before[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || place >= count) return;
  int rank = place % kRunLength;
  for (int w = 0; w < kMergeWarps; ++w) rank += shared.before[w][lane];
  sorted[rank] = number;
  order[rank] = runs.order[place];
}

}  // namespace deepsim::cuda
