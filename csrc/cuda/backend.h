// What differs between a GPU and the emulator that runs the same kernels on CPU tensors in tests (DEEPSIM_EMULATED).
#pragma once

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

}  // namespace deepsim::cuda
