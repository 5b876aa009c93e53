// Which instruction set the CPU kernels run with.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels.h"

namespace deepsim::cpu {

// "avx512", "avx2" or "portable": the best that this processor and operating system have, or the one that the environment
// variable DEEPSIM_CPU_CAPABILITY names; an error where that one is unknown or cannot run here. Read once.
const char* capability();

const KernelTable& kernel_table();

// Calls f with the kernels for a storage dtype: f(const Kernels<T>&).
template <class F>
auto dispatch(at::ScalarType storage, F f) {
  const KernelTable& table = kernel_table();
  switch (storage) {
    case at::kFloat: return f(table.float32);
    case at::kDouble: return f(table.float64);
    case at::kBFloat16: return f(table.bfloat16);
    case at::kHalf: return f(table.float16);
    default: TORCH_CHECK_TYPE(false, "deepsim_ext: no CPU kernels for ", storage);
  }
}

}  // namespace deepsim::cpu
