// CPU kernels for x86 processors with AVX2 and FMA. Nothing in this file may run before capability.cpp has asked for it.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define DEEPSIM_CAPABILITY avx2
#define DEEPSIM_VECTOR_BYTES 32
#include "table.h"

namespace deepsim::cpu {
extern const KernelTable avx2_kernels = avx2::table();
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
