// Large tensors in huge pages: the first write to fresh memory of tens of MB otherwise spends as long in page faults as the product that
// fills it, or longer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace deepsim::cpu {

// `fresh`, which nobody has written to.
inline at::Tensor in_huge_pages(at::Tensor fresh) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + fresh.nbytes()) / kHugePage * kHugePage;
  // Advice only: where the kernel does not offer huge pages, nothing changes.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return fresh;
}

}  // namespace deepsim::cpu
