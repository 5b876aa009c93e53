// Memory that kernels and the host both see, for programs that run either by the emulator or, compiled by nvcc, on a GPU.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "halves.h"

#if defined(__CUDACC__)
inline void synchronize() {
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  if (cudaMallocManaged(&p, std::max<size_t>(1, bytes)) != cudaSuccess) throw std::runtime_error("cudaMallocManaged failed");
  return p;
}
inline void release(void* p) { cudaFree(p); }
#else
inline void synchronize() {}
inline void* allocate(size_t bytes) { return std::malloc(std::max<size_t>(1, bytes)); }
inline void release(void* p) { std::free(p); }
#endif

// Of exactly this size, filled with NaN (or zeros, fill = 0).
template <class T>
struct Buffer {
  explicit Buffer(int64_t count, int fill = 0xff) : size(count), data(static_cast<T*>(allocate(count * sizeof(T)))) {
    std::memset(static_cast<void*>(data.get()), fill, count * sizeof(T));
  }
  T& operator[](int64_t i) { return data.get()[i]; }
  operator T*() { return data.get(); }

  int64_t size;
  struct Release {
    void operator()(T* p) const { release(p); }
  };
  std::unique_ptr<T, Release> data;
};

// Storage seen from the host.
inline double value_of(float v) { return v; }
inline double value_of(double v) { return v; }
inline double value_of(deepsim::cuda::BFloat16 v) { return halves::from_bfloat16(v.bits); }
inline double value_of(deepsim::cuda::Half v) { return halves::from_float16(v.bits); }
inline void assign(float& to, double v) { to = float(v); }
inline void assign(double& to, double v) { to = v; }
inline void assign(deepsim::cuda::BFloat16& to, double v) { to.bits = halves::to_bfloat16(float(v)); }
inline void assign(deepsim::cuda::Half& to, double v) { to.bits = halves::to_float16(float(v)); }
