// The best candidate so far as one integer, which any number of blocks raise by atomicMax in any order: the float's bits in an order
// that integers have, then the complement of the candidate's index. The largest key is the largest value and, among equals, the
// lowest index. 0 is no candidate.
#pragma once

#include "batch_hard.h"
#include "warp.cuh"

namespace deepsim::cuda {

__device__ __forceinline__ unsigned long long key_of(float value, uint32_t index) {
  const uint32_t bits = __float_as_uint(value);
  return (unsigned long long)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~index;
}

__device__ __forceinline__ float value_of_key(unsigned long long key) {
  const uint32_t bits = uint32_t(key >> 32);
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ int32_t index_of_key(unsigned long long key) { return key == 0 ? kNobody : int32_t(~uint32_t(key)); }

}  // namespace deepsim::cuda
