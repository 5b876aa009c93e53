// CPU kernels for x86 processors with AVX-512 (F, DQ, BW, VL). Nothing in this file may run before capability.cpp has asked for it.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma")
#endif
#define DEEPSIM_CAPABILITY avx512
#define DEEPSIM_VECTOR_BYTES 64
#include "table.h"

namespace deepsim::cpu {
extern const KernelTable avx512_kernels = avx512::table();
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
