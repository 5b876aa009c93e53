// Large outputs in huge pages: the first write to a fresh gradient of tens of MB otherwise spends as long in page faults as
// the product that fills it.
#pragma once

#include <ATen/ops/empty_like.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace deepsim::cpu {

inline at::Tensor empty_like_in_huge_pages(const at::Tensor& like) {
  at::Tensor t = at::empty_like(like);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + t.nbytes()) / kHugePage * kHugePage;
  // Advice only: where the kernel does not offer huge pages, nothing changes.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return t;
}

}  // namespace deepsim::cpu
