// Squared distances of a tile of rows and a tile of columns by direct differences: exact in every dtype and without any preparation.
#pragma once

#include "rows.cuh"

namespace deepsim::cuda {

constexpr int kDirectTile = 64;                        // rows, and columns at a time
constexpr int kDirectPerThread = 4;                    // of each, so 16 x 16 threads
constexpr int kDirectSide = kDirectTile / kDirectPerThread;
constexpr int kDirectThreads = kDirectSide * kDirectSide;
constexpr int kDirectDepth = 16;                       // elements of a row at a time

// Elements of both tiles' rows. Four more than the tile: rows that are stored down a column fall into different banks, and stay
// 16-byte aligned.
template <class T>
struct DirectElements {
  T rows[kDirectDepth][kDirectTile + 4], columns[kDirectDepth][kDirectTile + 4];
};

// The first row and column of a thread, in its tile.
__device__ __forceinline__ int direct_row() { return int(threadIdx.x) / kDirectSide * kDirectPerThread; }
__device__ __forceinline__ int direct_column() { return int(threadIdx.x) % kDirectSide * kDirectPerThread; }

// Columns [k0, k0 + kDirectDepth) of a tile's rows, zero beyond the matrix.
template <class S, class T>
__device__ __forceinline__ void load_direct(const Rows& x, const double* norms, int64_t first, int64_t k0,
                                            T (&to)[kDirectDepth][kDirectTile + 4]) {
  constexpr int kRun = kDirectTile * kDirectDepth / kDirectThreads;  // adjacent elements that a thread loads
  const int row = int(threadIdx.x) / (kDirectDepth / kRun), k = int(threadIdx.x) % (kDirectDepth / kRun) * kRun;
  const bool inside = first + row < x.count;
  const S* from = row_of<S>(x, inside ? first + row : 0);
  for (int e = 0; e < kRun; ++e) {
    to[k + e][row] = inside && k0 + k + e < x.depth ? normalised<T>(from[k0 + k + e], norms, first + row) : T(0);
  }
}

// square[i][j] = |a - b|^2 of the thread's rows and columns. Begins with a barrier, behind which `shared` is overwritten.
template <class S, class T>
__device__ __forceinline__ void direct_squares(DirectElements<T>& shared, const Rows& rows, const double* row_norms, int64_t first_row,
                                               const Rows& columns, const double* column_norms, int64_t first_column,
                                               T (&square)[kDirectPerThread][kDirectPerThread]) {
  for (auto& of_row : square)
    for (T& v : of_row) v = 0;
  for (int64_t k0 = 0; k0 < rows.depth; k0 += kDirectDepth) {
    __syncthreads();
    load_direct<S>(rows, row_norms, first_row, k0, shared.rows);
    load_direct<S>(columns, column_norms, first_column, k0, shared.columns);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDirectDepth; ++k) {
      T a[kDirectPerThread], b[kDirectPerThread];
      for (int i = 0; i < kDirectPerThread; ++i) a[i] = shared.rows[k][direct_row() + i];
      for (int j = 0; j < kDirectPerThread; ++j) b[j] = shared.columns[k][direct_column() + j];
      for (int i = 0; i < kDirectPerThread; ++i) {
        for (int j = 0; j < kDirectPerThread; ++j) {
          const T difference = a[i] - b[j];
          square[i][j] += difference * difference;
        }
      }
    }
  }
}

}  // namespace deepsim::cuda
