// The one inner loop of the CPU side: tile (+)= A · Bᵀ for two panels of packed rows.
//
// A panel holds kPanelRows rows interleaved, [depth][kPanelRows]: element (row r, column k) at k * kPanelRows + r. Both
// operands have that layout, so one packed copy of the data serves as left and as right operand. A tile is
// [kPanelRows][kPanelRows], row-major, and stays in L1; so do the kDepthBlock columns of both panels being multiplied.
#pragma once

#include "vec.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// kMicroRows x kMicroVectors accumulators must cover the FMA latency (4 cycles x 2 ports) and leave registers for the
// operands; kMicroRows divides the panel. 32 registers with AVX-512, 16 elsewhere.
#if DEEPSIM_VECTOR_BYTES == 64
inline constexpr int kMicroRows = 8, kMicroVectors = 2;
#elif DEEPSIM_VECTOR_BYTES == 32
inline constexpr int kMicroRows = 4, kMicroVectors = 3;
#else
inline constexpr int kMicroRows = 4, kMicroVectors = 2;
#endif

template <class T>
inline constexpr int kPanelRows = kMicroVectors * kLanes<T>;
static_assert(kPanelRows<float> % kMicroRows == 0 && kPanelRows<double> % kMicroRows == 0);

inline constexpr int64_t kDepthBlock = 128;

template <class T>
DEEPSIM_INLINE void micro_product(const T* a, const T* b, int64_t depth, T* tile, bool accumulate) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  Vec<T> sum[kMicroRows][kMicroVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += NR, b += NR) {
    Vec<T> right[kMicroVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kMicroVectors; ++v) right[v] = load(b + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < kMicroRows; ++r) {
      const Vec<T> left = broadcast(a[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kMicroVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kMicroRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kMicroVectors; ++v) {
      T* out = tile + r * NR + v * W;
      store(out, accumulate ? load<T>(out) + sum[r][v] : sum[r][v]);
    }
  }
}

// Blocks of the depth are summed on their own and then added, which also keeps the rounding error of long rows down.
template <class T>
inline void tile_product(const T* a, const T* b, int64_t depth, T* tile, bool accumulate) {
  constexpr int NR = kPanelRows<T>;
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const int64_t block = depth - k < kDepthBlock ? depth - k : kDepthBlock;
    for (int r = 0; r < NR; r += kMicroRows)
      micro_product(a + k * NR + r, b + k * NR, block, tile + r * NR, accumulate || k > 0);
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
