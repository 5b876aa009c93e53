// The part of the CUDA language and runtime that the kernels use, on top of the emulator.
#pragma once

#include <cstdlib>

#include "halves.h"

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block()->index)
#define gridDim (::emulator::block()->grid)
#define blockDim (::emulator::block()->size)
#define __syncthreads() ::emulator::barrier(__LINE__)
#define __syncwarp() ::emulator::warp_operation("__syncwarp", __LINE__, ~0u, nullptr, [](void**) {})
#define __shfl_sync(mask, value, source) ::emulator::shuffle(__LINE__, mask, value, source)
#define __shfl_xor_sync(mask, value, bits) ::emulator::shuffle(__LINE__, mask, value, int(threadIdx.x % 32) ^ (bits))
#define __ballot_sync(mask, predicate) ::emulator::ballot(__LINE__, mask, predicate)
#define __any_sync(mask, predicate) (::emulator::ballot(__LINE__, mask, predicate) != 0)

struct float2 {
  float x, y;
};

inline void __trap() { std::abort(); }

namespace emulator {

EMULATOR_NO_TSAN inline Dim3 thread_index() { return {unsigned(block()->running->index), 0, 0}; }

template <class T>
T shuffle(int line, unsigned mask, T value, int source) {
  struct Slot {
    T value;
    int source;
    T result;
  } slot{value, source & 31, value};
  warp_operation("__shfl_sync", line, mask, &slot, [mask](void** slots) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      Slot* s = static_cast<Slot*>(slots[l]);
      if (mask >> s->source & 1) s->result = static_cast<Slot*>(slots[s->source])->value;
    }
  });
  return slot.result;
}

inline unsigned ballot(int line, unsigned mask, bool predicate) {
  struct Slot {
    bool predicate;
    unsigned result;
  } slot{predicate, 0};
  warp_operation("__ballot_sync", line, mask, &slot, [mask](void** slots) {
    unsigned result = 0;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) result |= unsigned(static_cast<Slot*>(slots[l])->predicate) << l;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) static_cast<Slot*>(slots[l])->result = result;
  });
  return slot.result;
}

}  // namespace emulator

inline unsigned __float_as_uint(float f) { return halves::bits_of(f); }
inline float __uint_as_float(unsigned u) { return halves::float_of(u); }
inline long long __double_as_longlong(double d) { return (long long)halves::bits_of(d); }
inline double __longlong_as_double(long long n) { return halves::with_bits_of<double>(n); }
inline int __ffs(unsigned v) { return __builtin_ffs(int(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
EMULATOR_NO_TSAN inline void __threadfence() { ::emulator::block()->running->fenced = true; }

template <class T>
T atomicMax(T* p, T value) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value > old && !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicMin(T* p, T value) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(p, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
// Orders nothing but after a fence, as the ticket of a block that has written its part.
template <class T>
T atomicAdd(T* p, T value) {
  bool& fenced = ::emulator::block()->running->fenced;
  const bool ticket = fenced;
  fenced = false;
  return ticket ? __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL) : __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* p, T value) {
  return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);
}

namespace deepsim::cuda {

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, size_t shared_bytes, void*, const A&... args) {
  if (blocks < 1 || blocks > 0x7fffffff || threads < 1 || threads > 1024 || shared_bytes > 227 * 1024) {
    throw std::runtime_error("emulator: invalid launch configuration");
  }
  emulator::launch(blocks, threads, shared_bytes, [&] { kernel(args...); });
}

template <class T>
T& shared_memory() {
  if (sizeof(T) > emulator::block()->shared_bytes) emulator::fail("shared memory smaller than what stands in it");
  return *reinterpret_cast<T*>(emulator::block()->shared);
}

}  // namespace deepsim::cuda
