// A kGramTile x kColumns tile of products A B^T by one block, for matrices that lie either way round in memory: tensor cores for
// float32 (as TF32) and 16-bit storage, plain arithmetic for float64.
//
// A float32 is the sum of two TF32 numbers: it rounded to 11 bits, and as many of the rest. Products of the two small parts are left out:
// altogether about 2^-21 of a term, and of either sign. Tensor cores cut sums off, which takes up to 4e-7 where all terms have one sign,
// whatever the depth, as each chunk is summed for itself. 16-bit numbers are multiplied as they are. Where A is a float32 matrix and B
// holds 16-bit numbers, A comes as the sum of two 16-bit matrices.
#pragma once

#include "gram.h"
#include "lines.cuh"

namespace deepsim::cuda {

// A [rows, depth] matrix in storage S; one of the strides (in elements) is 1.
template <class S>
struct Matrix {
  const S* data;
  int64_t rows, depth, row_stride, depth_stride;
};

// kRows rows of a matrix and as much of the depth as 128 bytes hold, as they lie in memory: `along` with a row on a line, or `across`
// with one position of the depth, where rows are adjacent.
template <class S, int kRows>
union Operand {
  static constexpr int kDepth = 128 / sizeof(S);
  // Lines are 4 banks apart, modulo 32: the eight that ldmatrix reads at a time fill all. Single floats are read from four lines and
  // eight rows at a time: lines 8 banks apart.
  Lines<S, kRows, kDepth, 16> along;
  Lines<S, kDepth, kRows, sizeof(S) == 4 ? 32 : 16> across;

  template <bool kAcross, int kThreads>
  __device__ __forceinline__ void load(const Matrix<S>& m, int64_t first_row, int64_t first, int64_t end) {
    const int64_t rows = m.rows - first_row, depth = end - first;
    if constexpr (kAcross) {
      across.template load<kThreads>(m.data + first * m.depth_stride + first_row, m.depth_stride, depth, rows);
    } else {
      along.template load<kThreads>(m.data + first_row * m.row_stride + first, m.row_stride, rows, depth);
    }
  }

  template <bool kAcross>
  __device__ __forceinline__ S at(int row, int k) const {
    return kAcross ? *across.at(k, row) : *along.at(row, k);
  }

  // 16 rows and 32 bytes of the depth, the step-th, as fragments of tensor cores (see ptx::mma, ptx::mma_tf32): rows 0 to 7 and 8 to 15
  // of the first half of the depth, then of the second.
  template <bool kAcross>
  __device__ __forceinline__ void read(uint32_t (&r)[4], int first_row, int step) const {
    const int lane = lane_index();
    if constexpr (!kAcross) {
      ptx::ldmatrix_x4(r, along.line[first_row + lane % 16] + step * 32 + lane / 16 * 16);
    } else if constexpr (sizeof(S) == 2) {
      ptx::ldmatrix_x4_transposed(r, across.at(step * 16 + lane / 16 * 8 + lane % 8, first_row + lane / 8 % 2 * 8));
    } else {
#pragma unroll
      for (int h = 0; h < 4; ++h) r[h] = __float_as_uint(*across.at(step * 8 + h / 2 * 4 + lane % 4, first_row + h % 2 * 8 + lane / 4));
    }
  }
};

// ---- float32 and 16 bits: tensor cores ----

// kColumns: of the tile. kLefts: of how many matrices A is the sum. kSplit: whether the small parts of float32 take part.
template <class S, int kColumns_, int kLefts_, bool kSplit>
struct TensorProduct {
  using Storage = S;
  using T = float;
  static constexpr int kColumns = kColumns_, kLefts = kLefts_;

  // Warps of 32 x 32, two of them down and the others across.
  static constexpr int kWarpTile = 32, kWarpsAcross = kColumns / kWarpTile, kThreads = kGramTile / kWarpTile * kWarpsAcross * kWarp;
  static constexpr int kRowFragments = kWarpTile / 16, kColumnFragments = kWarpTile / 8;
  // As many as registers allow: a thread of the gradient may have 128 only, and small parts take twice as many.
  static constexpr int kSteps = 4, kStepsAtOnce = kSplit || kColumns > kGramTile ? 1 : kSteps;
  float sum[kRowFragments][kColumnFragments][4] = {};

  // Leaves the large part in `bits`, rounded to what TF32 keeps, and returns the rest: what is below it, of either sign, of which tensor
  // cores cut off what TF32 does not keep. Where the bits of a NaN overflow, the rest is one still.
  __device__ __forceinline__ static uint32_t split(uint32_t& bits) {
    const float v = __uint_as_float(bits);
    bits = (bits + 0x1000u) & 0xffffe000u;
    return __float_as_uint(v - __uint_as_float(bits));
  }

  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (sizeof(S) == 4) {
      ptx::mma_tf32(d, a, b);
    } else {
      ptx::mma(S{}, d, a, b);
    }
  }

  template <bool kAcrossA, bool kAcrossB>
  __device__ __forceinline__ void add(const Operand<S, kGramTile> (&a)[kLefts], const Operand<S, kColumns>& b) {
    const int warp = int(threadIdx.x) / kWarp;
    const int first_row = warp / kWarpsAcross * kWarpTile, first_column = warp % kWarpsAcross * kWarpTile;
    // Tensor cores cut off what does not fit; over thousands of positive terms that would lean to one side. So they add up
    // what an operand holds, and the rest of the way is plain, rounded arithmetic.
    float part[kRowFragments][kColumnFragments][4] = {};
#pragma unroll kStepsAtOnce
    for (int step = 0; step < kSteps; ++step) {
      uint32_t big_b[kColumnFragments][2], small_b[kColumnFragments][2];
#pragma unroll
      for (int j = 0; j < kColumnFragments; j += 2) {
        uint32_t r[4];
        b.template read<kAcrossB>(r, first_column + j * 8, step);
        for (int h = 0; h < 4; ++h) {
          small_b[j + h % 2][h / 2] = kSplit ? split(r[h]) : 0;
          big_b[j + h % 2][h / 2] = r[h];
        }
      }
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i) {
#pragma unroll
        for (int left = kLefts - 1; left >= 0; --left) {  // small ones first
          uint32_t big_a[4], small_a[4];
          a[left].template read<kAcrossA>(big_a, first_row + i * 16, step);
          for (int h = 0; h < 4; ++h) small_a[h] = kSplit ? split(big_a[h]) : 0;
#pragma unroll
          for (int j = 0; j < kColumnFragments; ++j) {
            if constexpr (kSplit) {
              multiply(part[i][j], small_a, big_b[j]);
              multiply(part[i][j], big_a, small_b[j]);
            }
            multiply(part[i][j], big_a, big_b[j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j)
        for (int e = 0; e < 4; ++e) sum[i][j][e] += part[i][j][e];
  }

  // f(row, column, sum of products there, and in the next column), for this thread's part of the tile.
  template <class F>
  __device__ __forceinline__ void for_each_pair(F f) const {
    const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
    const int row = warp / kWarpsAcross * kWarpTile + lane / 4, column = warp % kWarpsAcross * kWarpTile + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) f(row + i * 16 + h * 8, column + j * 8, sum[i][j][h * 2], sum[i][j][h * 2 + 1]);
  }

  // f(row, first column, at) for this thread's part of a row: at(j, next) is the sum in column first + 8 j + next. Four neighbouring lanes
  // share kWarpTile columns of a row.
  template <class F>
  __device__ __forceinline__ void for_each_row(F f) const {
    const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
    const int row = warp / kWarpsAcross * kWarpTile + lane / 4, column = warp % kWarpsAcross * kWarpTile + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) f(row + i * 16 + h * 8, column, [&](int j, int next) { return sum[i][j][h * 2 + next]; });
  }
};

// ---- float64: plain arithmetic ----

struct PlainProduct {
  using Storage = double;
  using T = double;
  static constexpr int kColumns = kGramTile, kLefts = 1, kThreads = 128;

  // 16 threads down, of 4 rows 16 apart; the others across, of 4 pairs of columns.
  static constexpr int kDown = 16, kAcross = kThreads / kDown, kRows = kGramTile / kDown, kPairs = kColumns / kAcross / 2;
  double sum[kRows][kPairs][2] = {};

  template <bool kAcrossA, bool kAcrossB>
  __device__ __forceinline__ void add(const Operand<double, kGramTile> (&a)[1], const Operand<double, kColumns>& b) {
    const int row = int(threadIdx.x) % kDown, column = int(threadIdx.x) / kDown * 2;
#pragma unroll 1  // more at a time would spill
    for (int k = 0; k < Operand<double, kColumns>::kDepth; ++k)
#pragma unroll
      for (int j = 0; j < kPairs; ++j)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
          for (int e = 0; e < 2; ++e) {
            sum[i][j][e] += a[0].template at<kAcrossA>(row + i * kDown, k) * b.template at<kAcrossB>(column + j * 2 * kAcross + e, k);
          }
  }

  template <class F>
  __device__ __forceinline__ void for_each_pair(F f) const {
    const int row = int(threadIdx.x) % kDown, column = int(threadIdx.x) / kDown * 2;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kPairs; ++j) f(row + i * kDown, column + j * 2 * kAcross, sum[i][j][0], sum[i][j][1]);
  }
};

// ---- the loop ----

// What is multiplied at a time.
template <class Product>
struct ProductStage {
  Operand<typename Product::Storage, kGramTile> a[Product::kLefts];
  Operand<typename Product::Storage, Product::kColumns> b;
};

// Adds the products of columns [begin, end) of A's rows from first_a and B's rows from first_b. `same`: they are the same rows of
// the same matrix, which are then loaded once. All but one of the stages are on their way while that one is multiplied.
template <bool kAcrossA, bool kAcrossB, class Product, int kStages, class S>
__device__ __forceinline__ void multiply(Product& product, ProductStage<Product> (&stages)[kStages], const Matrix<S> (&a)[Product::kLefts],
                                         int64_t first_a, const Matrix<S>& b, int64_t first_b, bool same, int64_t begin, int64_t end) {
  constexpr int kDepth = Operand<S, kGramTile>::kDepth;
  const int chunks = int((end - begin + kDepth - 1) / kDepth);
  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      auto& stage = stages[chunk % kStages];
      const int64_t first = begin + int64_t(chunk) * kDepth;
#pragma unroll
      for (int left = 0; left < Product::kLefts; ++left) {
        stage.a[left].template load<kAcrossA, Product::kThreads>(a[left], first_a, first, end);
      }
      if (!same) stage.b.template load<kAcrossB, Product::kThreads>(b, first_b, first, end);
    }
    ptx::cp_async_commit();  // a group for every chunk, also where there is none, keeps the count right
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this chunk is there for all, and nobody needs the one before
    load(chunk + kStages - 1);
    const auto& stage = stages[chunk % kStages];
    if constexpr (Product::kColumns == kGramTile) {
      product.template add<kAcrossA, kAcrossB>(stage.a, same ? stage.a[0] : stage.b);
    } else {
      product.template add<kAcrossA, kAcrossB>(stage.a, stage.b);
    }
  }
}

}  // namespace deepsim::cuda
