// Words that all kernels share: warps, lanes, the type of the arithmetic.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace deepsim::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = ~0u;

// The type of arithmetic on storage S.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <class T>
__device__ __forceinline__ T infinity() {
  return T(__builtin_huge_val());
}

__device__ __forceinline__ float largest_float() { return 3.402823466e38f; }

template <class T>
__device__ __forceinline__ T not_a_number() {
  return T(__builtin_nan(""));
}

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % kWarp; }

// The sum over the lanes, the same in all of them, in a fixed order.
template <class T>
__device__ __forceinline__ T warp_sum(T v) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) v += __shfl_xor_sync(kAllLanes, v, bits);
  return v;
}

// The sum over the lanes up to this one.
template <class T>
__device__ __forceinline__ T warp_sum_so_far(T v) {
  for (int step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_sync(kAllLanes, v, (lane_index() + kWarp - step) % kWarp);
    if (lane_index() >= step) v += before;
  }
  return v;
}

}  // namespace deepsim::cuda
