// What differs between a GPU and the emulator that runs the same kernels on CPU tensors in tests (DEEPSIM_EMULATED).
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

namespace deepsim::cuda {

#if defined(DEEPSIM_EMULATED)
#define DEEPSIM_CUDA_KEY CPU

inline void* current_stream(const at::Tensor&) { return nullptr; }
#else
#define DEEPSIM_CUDA_KEY CUDA

// By way of the guard: c10/cuda headers come with CUDA builds of torch only, and this is to build against any.
inline void* current_stream(const at::Tensor& x) {
  return c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
}
#endif

// Whether one pass of products of 11 bits will do for this tensor: where torch's own products of float32 are allowed TF32, by either
// of the ways to say so.
inline bool tf32_allowed(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat && at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
                                              at::Float32Precision::TF32;
}

}  // namespace deepsim::cuda
