// From the strengths of all pairs to gradients by tensor cores: what pulls at row a is a sum_b s_ab - sum_b s_ab b, of centred rows.
// Pairs so close that the difference of the two would be lost are not among them (pull_singles.cuh).
#pragma once

#include "all_pairs.h"
#include "block.cuh"
#include "tile_product.cuh"

namespace deepsim::cuda {

// 64 rows by 128 elements of them.
using PullProduct = TensorProduct<float, 128, 1, true>;
constexpr int kPullStages = 2;

struct PullProducts {
  Matrix<float> strengths;  // rows that are pulled by rows that pull
  CentredRows own, others;  // from the first of either on
  int64_t depth;
  const float* sums;  // of the strengths of a row
  int splits;         // of the rows that pull
  const Flags* flags;
  float* out;  // [splits][rows][depth]
  bool accumulate;
};

// What a block works on.
struct PullTile {
  int64_t split, first_row, first_element;

  __device__ __forceinline__ PullTile(const PullProducts& p, int block) {
    const int64_t depth_tiles = (p.depth + PullProduct::kColumns - 1) / PullProduct::kColumns;
    const int64_t tiles = (p.strengths.rows + kGramTile - 1) / kGramTile * depth_tiles;
    split = block / tiles;
    first_row = block % tiles / depth_tiles * kGramTile;
    first_element = block % tiles % depth_tiles * PullProduct::kColumns;
  }
};

// kAcross: strengths of rows that are pulled are adjacent.
template <bool kAcross>
__global__ void __launch_bounds__(PullProduct::kThreads, 2) pull_products_kernel(PullProducts p) {
  auto& stage = shared_memory<ProductStage<PullProduct>[kPullStages]>();
  if (p.flags->not_finite) return;
  const int64_t others = p.strengths.depth;
  constexpr int kChunk = Operand<float, kGramTile>::kDepth;
  const int64_t chunks = (others + kChunk - 1) / kChunk, share = (chunks + p.splits - 1) / p.splits * kChunk;
  PullProduct product;
  {
    const PullTile tile(p, int(blockIdx.x));
    const int64_t begin = tile.split * share < others ? tile.split * share : others;
    const int64_t end = begin + share < others ? begin + share : others;
    const Matrix<float> strengths[1] = {p.strengths};
    const Matrix<float> transposed{p.others.rows, p.depth, others, 1, p.others.stride};
    multiply<kAcross, true>(product, stage, strengths, tile.first_row, transposed, tile.first_element, false, begin, end);
  }
  int block = int(blockIdx.x);
  ptx::forget(block);  // or what is needed of it now would have taken registers from the product
  const PullTile tile(p, block);
  float* out = p.out + tile.split * p.strengths.rows * p.depth;
  product.for_each_pair([&](int r, int c, float first, float second) {
    const int64_t row = tile.first_row + r, element = tile.first_element + c;
    if (row >= p.strengths.rows) return;
    const float sum = tile.split == 0 ? p.sums[row] : 0;
    const auto put = [&](int next, float pulled) {
      if (element + next >= p.depth) return;
      float& to = out[row * p.depth + element + next];
      const float v = sum * p.own.rows[row * p.own.stride + element + next] - pulled;
      to = p.accumulate ? to + v : v;
    };
    put(0, first);
    put(1, second);
  });
}

constexpr int kSumColumns = 32;
constexpr int kSumGroups = kBlockThreads / kSumColumns;

// sums[c] = the sum of column c of a stripe's strengths.
__global__ void __launch_bounds__(kBlockThreads) strength_sums_kernel(Stripe stripe, int64_t columns, const Flags* flags) {
  auto& partial = shared_memory<float[kSumGroups][kSumColumns]>();
  if (flags->not_finite) return;
  const int lane = int(threadIdx.x) % kSumColumns, group = int(threadIdx.x) / kSumColumns;
  const int64_t c = int64_t(blockIdx.x) * kSumColumns + lane;
  const float* strengths = static_cast<const float*>(stripe.strengths);
  float sum = 0;
  if (c < columns) {
#pragma unroll 8
    for (int64_t row = group; row < stripe.rows; row += kSumGroups) sum += strengths[row * stripe.stride + c];
  }
  partial[group][lane] = sum;
  __syncthreads();
  if (group != 0 || c >= columns) return;
  for (int other = 1; other < kSumGroups; ++other) sum += partial[other][lane];
  static_cast<float*>(stripe.reference_sums)[c] = sum;
}

}  // namespace deepsim::cuda
