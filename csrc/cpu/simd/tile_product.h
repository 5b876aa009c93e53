// The one inner loop of the CPU side: tile (+)= A · Bᵀ for two panels of packed rows.
//
// A panel holds kPanelRows rows interleaved, [depth][kPanelRows]: element (row r, column k) at k * kPanelRows + r. Both
// operands have that layout, so one packed copy of the data serves as left and as right operand. A tile is
// [kPanelRows][kPanelRows], row-major, and stays in L1; so do the kDepthBlock columns of both panels being multiplied.
#pragma once

#include "../kernels.h"
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

// kRows rows of a tile, in its columns from register kFirst on.
template <class T, int kRows = kMicroRows, int kFirst = 0>
DEEPSIM_INLINE void micro_product(const T* a, const T* b, int64_t depth, T* tile, bool accumulate) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>, kVectors = kMicroVectors - kFirst;
  b += kFirst * W;
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, a += NR, b += NR) {
    Vec<T> right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> left = broadcast(a[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      T* out = tile + r * NR + (kFirst + v) * W;
      store(out, accumulate ? load<T>(out) + sum[r][v] : sum[r][v]);
    }
  }
}

// The first `rows` rows of the tile, rounded up to kMicroRows. Blocks of the depth are summed on their own and then added,
// which also keeps the rounding error of long rows down.
template <class T>
inline void tile_product(const T* a, const T* b, int64_t depth, T* tile, bool accumulate, int64_t rows = kPanelRows<T>) {
  constexpr int NR = kPanelRows<T>;
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    const int64_t block = depth - k < kDepthBlock ? depth - k : kDepthBlock;
    for (int64_t r = 0; r < rows; r += kMicroRows)
      micro_product(a + k * NR + r, b + k * NR, block, tile + r * NR, accumulate || k > 0);
  }
}

// The rows of a symmetric tile whose diagonal lies in register kFirst, then those of the next registers. One register of columns
// takes twice the rows, or its accumulators would not cover the latency.
template <class T, int kFirst>
DEEPSIM_INLINE void upper_product(const T* a, int64_t depth, T* tile, bool accumulate, int64_t rows) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  if constexpr (kFirst < kMicroVectors) {
    constexpr int kRows = kFirst + 1 == kMicroVectors && W % (2 * kMicroRows) == 0 ? 2 * kMicroRows : kMicroRows;
    for (int64_t r = kFirst * W; r < (kFirst + 1) * W && r < rows; r += kRows)
      micro_product<T, kRows, kFirst>(a + r, a, depth, tile + r * NR, accumulate);
    upper_product<T, kFirst + 1>(a, depth, tile, accumulate, rows);
  }
}

// The first `rows` rows of the tile of a panel with itself, from the diagonal to the right; what is left of it is not written, or in
// part. The same bits as in `tile_product`.
template <class T>
inline void symmetric_tile_product(const T* a, int64_t depth, T* tile, bool accumulate, int64_t rows) {
  if constexpr (kLanes<T> % kMicroRows != 0) {
    tile_product(a, a, depth, tile, accumulate, rows);
  } else {
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
      const int64_t block = depth - k < kDepthBlock ? depth - k : kDepthBlock;
      upper_product<T, 0>(a + k * kPanelRows<T>, block, tile, accumulate || k > 0, rows);
    }
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
