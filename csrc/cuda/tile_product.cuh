// A kGramTile x kGramTile tile of products A B^T by one block of kProductThreads threads, for matrices that lie either way round in
// memory: TF32 tensor cores for float32 and 16-bit storage, plain arithmetic for float64.
//
// 16-bit numbers are TF32 numbers already. A float32 is the sum of two: the upper 11 bits of its fraction, and the rest rounded to
// as many; products of the two small parts are left out, which leaves an error of 2^-22.
#pragma once

#include "gram.h"
#include "warp.cuh"

namespace deepsim::cuda {

constexpr int kProductThreads = 256;
constexpr int kPieceElements = 4;  // that a thread loads at a time along the depth

// A [rows, depth] matrix in storage S; one of the strides (in elements) is 1.
template <class S>
struct Matrix {
  const S* data;
  int64_t rows, depth, row_stride, depth_stride;
};

template <class S>
struct alignas(kPieceElements * sizeof(S)) Quad {
  S element[kPieceElements];
};

// A thread's share of kGramTile rows and kDepth columns of a matrix, on its way through registers.
template <class T, int kDepth>
struct Fetched {
  static constexpr int kAcross = kDepth / kPieceElements;  // pieces in a row
  static constexpr int kPieces = kGramTile * kAcross / kProductThreads;
  T piece[kPieces][kPieceElements];

  // Neighbouring threads take what lies beside each other in memory.
  template <class S>
  __device__ __forceinline__ static void place(const Matrix<S>& m, int q, int& row, int& column) {
    const int i = int(threadIdx.x) + q * kProductThreads;
    const bool along_depth = m.depth_stride == 1;
    row = along_depth ? i / kAcross : i % kGramTile;
    column = (along_depth ? i % kAcross : i / kGramTile) * kPieceElements;
  }

  // Rows from first_row, columns [first, end); zero beyond the matrix and the end.
  template <class S>
  __device__ __forceinline__ void fetch(const Matrix<S>& m, int64_t first_row, int64_t first, int64_t end) {
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      int row, column;
      place(m, q, row, column);
      const int64_t k = first + column;
      const bool inside = first_row + row < m.rows;
      const S* from = m.data + (inside ? first_row + row : 0) * m.row_stride + k * m.depth_stride;
      if (inside && m.depth_stride == 1 && k + kPieceElements <= end && reinterpret_cast<uintptr_t>(from) % sizeof(Quad<S>) == 0) {
        const Quad<S> quad = *reinterpret_cast<const Quad<S>*>(from);
        for (int e = 0; e < kPieceElements; ++e) piece[q][e] = T(widen(quad.element[e]));
      } else {
        for (int e = 0; e < kPieceElements; ++e) {
          piece[q][e] = inside && k + e < end ? T(widen(from[e * m.depth_stride])) : T(0);
        }
      }
    }
  }
};

// ---- float: TF32 tensor cores ----

// Whether the small parts of A and B take part.
template <bool kSplitA, bool kSplitB>
struct TensorProduct {
  using T = float;
  static constexpr int kDepth = 32;

  // 16-byte pieces of row r stand at piece ^ (r % 8), so that ldmatrix meets no bank twice.
  struct alignas(16) Operand {
    unsigned char row[kGramTile][kDepth * sizeof(float)];
  };

  // Two by four warps of 32 x 16; in each, 16 x 8 fragments.
  static constexpr int kWarpsAcross = 4, kRowFragments = 2, kColumnFragments = 2;
  static constexpr int kWarpRows = 16 * kRowFragments, kWarpColumns = 8 * kColumnFragments;
  float sum[kRowFragments][kColumnFragments][4] = {};

  template <class S>
  __device__ __forceinline__ static void store(const Fetched<float, kDepth>& fetched, const Matrix<S>& m, Operand& to) {
#pragma unroll
    for (int q = 0; q < Fetched<float, kDepth>::kPieces; ++q) {
      int row, column;
      fetched.place(m, q, row, column);
      Quad<float> quad;
      for (int e = 0; e < kPieceElements; ++e) quad.element[e] = fetched.piece[q][e];
      *reinterpret_cast<Quad<float>*>(to.row[row] + ((column / kPieceElements) ^ (row % 8)) * sizeof(quad)) = quad;
    }
  }

  // Leaves the upper part in `bits` and returns the rest, rounded to what TF32 keeps.
  __device__ __forceinline__ static uint32_t split(uint32_t& bits) {
    const float rest = __uint_as_float(bits) - __uint_as_float(bits & 0xffffe000u);
    bits &= 0xffffe000u;
    return rest != rest ? 0x7fc00000u : __float_as_uint(rest) + 0x1000u;
  }

  __device__ __forceinline__ void add(const Operand& a, const Operand& b) {
    const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
    const int first_row = warp / kWarpsAcross * kWarpRows, first_column = warp % kWarpsAcross * kWarpColumns;
    // Tensor cores cut off what does not fit; over thousands of positive terms that would lean to one side. So they add up
    // kDepth columns only, and the rest of the way is plain, rounded arithmetic.
    float part[kRowFragments][kColumnFragments][4] = {};
#pragma unroll 1  // more at a time would spill
    for (int piece = 0; piece < kDepth / kPieceElements; piece += 2) {  // eight columns
      uint32_t big_a[kRowFragments][4], small_a[kRowFragments][4], big_b[kColumnFragments][2], small_b[kColumnFragments][2];
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
        const int row = first_row + i * 16 + lane % 16;
        ptx::ldmatrix_x4(big_a[i], a.row[row] + ((piece + lane / 16) ^ (row % 8)) * 16);
        for (int r = 0; r < 4; ++r) small_a[i][r] = kSplitA ? split(big_a[i][r]) : 0;
      }
#pragma unroll
      for (int j = 0; j < kColumnFragments; j += 2) {
        const int row = first_column + j * 8 + lane / 16 * 8 + lane % 8;
        uint32_t r[4];
        ptx::ldmatrix_x4(r, b.row[row] + ((piece + lane / 8 % 2) ^ (row % 8)) * 16);
        for (int h = 0; h < 4; ++h) {
          const uint32_t rest = kSplitB ? split(r[h]) : 0;
          big_b[j + h / 2][h % 2] = r[h];
          small_b[j + h / 2][h % 2] = rest;
        }
      }
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) {
          if constexpr (kSplitA) ptx::mma_tf32(part[i][j], small_a[i], big_b[j]);
          if constexpr (kSplitB) ptx::mma_tf32(part[i][j], big_a[i], small_b[j]);
          ptx::mma_tf32(part[i][j], big_a[i], big_b[j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j)
        for (int e = 0; e < 4; ++e) sum[i][j][e] += part[i][j][e];
  }

  // f(row, column, sum of products), for this thread's part of the tile.
  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
    const int row = warp / kWarpsAcross * kWarpRows + lane / 4, column = warp % kWarpsAcross * kWarpColumns + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j)
        for (int e = 0; e < 4; ++e) f(row + i * 16 + e / 2 * 8, column + j * 8 + e % 2, sum[i][j][e]);
  }
};

// ---- double: plain arithmetic ----

struct PlainProduct {
  using T = double;
  static constexpr int kDepth = 16;

  struct Operand {
    double column[kDepth][kGramTile + 2];  // two more: what is stored down a column falls into different banks
  };

  // 16 x 16 threads of 4 x 4 elements, 16 rows and columns apart: neighbours read neighbouring words.
  static constexpr int kDown = 16, kAcross = kProductThreads / kDown;
  double sum[kGramTile / kDown][kGramTile / kAcross] = {};

  template <class S>
  __device__ __forceinline__ static void store(const Fetched<double, kDepth>& fetched, const Matrix<S>& m, Operand& to) {
    for (int q = 0; q < Fetched<double, kDepth>::kPieces; ++q) {
      int row, column;
      fetched.place(m, q, row, column);
      for (int e = 0; e < kPieceElements; ++e) to.column[column + e][row] = fetched.piece[q][e];
    }
  }

  __device__ __forceinline__ void add(const Operand& a, const Operand& b) {
    const int row = int(threadIdx.x) % kDown, column = int(threadIdx.x) / kDown;
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int i = 0; i < kGramTile / kDown; ++i)
#pragma unroll
        for (int j = 0; j < kGramTile / kAcross; ++j) sum[i][j] += a.column[k][row + i * kDown] * b.column[k][column + j * kAcross];
  }

  template <class F>
  __device__ __forceinline__ void for_each(F f) const {
    const int row = int(threadIdx.x) % kDown, column = int(threadIdx.x) / kDown;
#pragma unroll
    for (int i = 0; i < kGramTile / kDown; ++i)
#pragma unroll
      for (int j = 0; j < kGramTile / kAcross; ++j) f(row + i * kDown, column + j * kAcross, sum[i][j]);
  }
};

// ---- the loop ----

template <class Product>
struct ProductShared {
  typename Product::Operand a[2], b[2];  // one is read while the other is filled
};

// Adds the products of columns [begin, end) of A's rows from first_a and B's rows from first_b. `same`: they are the same rows of
// the same matrix, which are then loaded once.
template <class Product, class A, class B>
__device__ __forceinline__ void multiply(Product& product, ProductShared<Product>& shared, const Matrix<A>& a, int64_t first_a,
                                         const Matrix<B>& b, int64_t first_b, bool same, int64_t begin, int64_t end) {
  Fetched<typename Product::T, Product::kDepth> next_a, next_b;
  const auto fetch = [&](int64_t k) {
    next_a.fetch(a, first_a, k, end);
    if (!same) next_b.fetch(b, first_b, k, end);
  };
  const auto store = [&](int stage) {
    Product::store(next_a, a, shared.a[stage]);
    if (!same) Product::store(next_b, b, shared.b[stage]);
  };
  fetch(begin);
  store(0);
  int stage = 0;
  for (int64_t k = begin; k < end; k += Product::kDepth, stage ^= 1) {
    __syncthreads();  // this stage is filled, and all are through with the other
    const bool more = k + Product::kDepth < end;
    if (more) fetch(k + Product::kDepth);
    product.add(shared.a[stage], same ? shared.a[stage] : shared.b[stage]);
    if (more) store(stage ^ 1);
  }
}

}  // namespace deepsim::cuda
