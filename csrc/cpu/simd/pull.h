// The gradient of a loss of all pairs: every pair (i, j) pulls its two rows with a strength s_ij,
//     gradient_j += s_ij (x_j - x_i),    gradient_i += s_ij (x_i - x_j),
// which for a tile of pairs is one product with the other panel, as fast as the product that gave the distances. A row's own part,
// x_j times the sum of its strengths, is left to the end: the sums stand behind the gradient of a panel (gathered_depth in kernels.h).
#pragma once

#include <type_traits>  // integral_constant: types only, no code

#include "transpose.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// gradient[k][c] -= sum over m of s[m][c] other[k][m] for kRows values of k.
template <class T, int kRows>
DEEPSIM_INLINE void pull_rows(const T* other, const T* s, T* gradient) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  Vec<T> sum[kRows][kMicroVectors] = {};
  for (int m = 0; m < NR; ++m) {
    Vec<T> strength[kMicroVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kMicroVectors; ++v) strength[v] = load(s + m * NR + v * W);
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
      const Vec<T> x = broadcast(other[k * NR + m]);
#pragma GCC unroll 8
      for (int v = 0; v < kMicroVectors; ++v) sum[k][v] += x * strength[v];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < kMicroVectors; ++v) {
      T* out = gradient + k * NR + v * W;
      store(out, load<T>(out) - sum[k][v]);
    }
  }
}

// Difference by difference, the row's own part too, for tiles in which rows are so close that the sums above would cancel.
template <class T, int kRows>
DEEPSIM_INLINE void pull_rows_by_differences(const T* self, const T* other, const T* s, T* gradient) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  Vec<T> sum[kRows][kMicroVectors] = {};
  for (int m = 0; m < NR; ++m) {
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < kMicroVectors; ++v)
        sum[k][v] += load(s + m * NR + v * W) * (load(self + k * NR + v * W) - broadcast(other[k * NR + m]));
    }
  }
  for (int k = 0; k < kRows; ++k) {
    for (int v = 0; v < kMicroVectors; ++v) {
      T* out = gradient + k * NR + v * W;
      store(out, load<T>(out) + sum[k][v]);
    }
  }
}

// One side of a tile: the rows of panel `self` are pulled towards (s > 0: pushed from, downhill) those of `other`; s is [other][self].
template <class T>
inline void pull(const T* self, const T* other, const T* s, int64_t depth, bool close, T* gradient) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  if (!close) {
    T* strength = gradient + depth * NR;
    for (int v = 0; v < kMicroVectors; ++v) {
      Vec<T> total = {};
      for (int m = 0; m < NR; ++m) total += load(s + m * NR + v * W);
      store(strength + v * W, load<T>(strength + v * W) + total);
    }
  }
  int64_t k = 0;
  const auto step = [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
    if (close) {
      pull_rows_by_differences<T, kRows>(self + k * NR, other + k * NR, s, gradient + k * NR);
    } else {
      pull_rows<T, kRows>(other + k * NR, s, gradient + k * NR);
    }
    k += kRows;
  };
  while (k + kMicroRows <= depth) step(std::integral_constant<int, kMicroRows>());
  while (k < depth) step(std::integral_constant<int, 1>());
}

template <class T>
inline void transpose_tile(const T* in, T* out) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  for (int r = 0; r < NR; r += W) {
    for (int c = 0; c < NR; c += W) {
      Vec<T> block[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) block[l] = load(in + (r + l) * NR + c);
      transpose<W / 2, T>(block);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(out + (c + l) * NR + r, block[l]);
    }
  }
}

// Both sides of a tile of strengths [row][column], or its rows only, where column_gradient is null. A tile on the diagonal of the self
// form holds every pair twice: it pulls its rows only, with s_ij + s_ji.
template <class T>
inline void pull_tile(const TileBlock<T>& m, int64_t row, int64_t column, const T* strength, bool diagonal, bool close,
                      T* row_gradient, T* column_gradient) {
  constexpr int64_t NR = kPanelRows<T>;
  alignas(64) T transposed[NR * NR];
  transpose_tile(strength, transposed);
  const int64_t depth = m.rows.depth, stride = gathered_depth(depth);
  const T *rows = m.rows.panels + row * depth, *columns = m.columns.panels + column * depth;
  if (diagonal) {
    for (int64_t i = 0; i < NR * NR; i += kLanes<T>) store(transposed + i, load(transposed + i) + load(strength + i));
  } else if (column_gradient != nullptr) {
    pull(columns, rows, strength, depth, close, column_gradient + column * stride);
  }
  pull(rows, columns, transposed, depth, close, row_gradient + row * stride);
}

// Replaces the weights of a tile's distances (derivatives of the loss by them) by strengths, given its distances.
template <class T>
inline void strengths(T* weight, const T* distance, Distance kind) {
  constexpr int64_t NR = kPanelRows<T>;
  for (int64_t i = 0; i < NR * NR; i += kLanes<T>) {
    const Vec<T> w = load(weight + i), d = load(distance + i);
    if (kind == Distance::euclidean) store(weight + i, d > T(0) ? w / d : w * T(0));
    if (kind == Distance::sqeuclidean) store(weight + i, w + w);
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
