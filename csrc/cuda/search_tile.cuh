// What mining does with a tile of tensor-core products: which tile a block has, and the search of its values. A tile of distances
// never leaves the registers. mine_mma.cuh and mine_wgmma.cuh make the products.
//
// With h = |x|^2 / 2 and rows of operand a and b, the value of a pair is e = h_i + h_j - s_i s_j (a b) = |x_i - x_j|^2 / 2, the same
// bits for (i, j) and (j, i). Rows are sorted by label: a tile either holds no positive at all, and is searched for its smallest
// values only, or it is mixed. In the self form only tiles on and above the diagonal are computed, each for its rows and its
// columns.
//
// The best of an anchor is kept in global memory as one 64-bit key that atomicMax raises: the float's bits in an order that
// integers have, then the complement of the candidate's original index. The largest key is the best value and, among equals, the
// lowest index, whatever the order in which tiles come. 0 is no candidate.
#pragma once

#include "pack.cuh"

namespace deepsim::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;

// Tensor cores cut sums off instead of rounding them. Where all terms have one sign, a product of rows of kShallow columns is short
// by up to 5e-6 of itself, which selection to 1e-5 can bear; longer rows of Split operands are `deep`: each chunk is summed for itself
// and then added to a second set of registers. That leaves room for one block on a multiprocessor. Otherwise there are two, which
// hide each other's waiting.
constexpr int kShallow = 384;
template <bool kDeep>
constexpr int kBlocksAtOnce = kDeep ? 1 : 2;

// What is known of the tile's rows, then of its columns.
struct TileDescription {
  float half_norm[2][kTileRows], scale[2][kTileRows];
  int32_t label_id[2][kTileRows], original[2][kTileRows];
};

struct TileArguments {
  PackedSet rows, columns;
  int64_t row_tiles, column_tiles;
  int chunks;  // of a row of the operands
  bool self_form;
  unsigned long long *positive, *negative;
};

// Tiles are walked in squares, so that the blocks that run together share what is in L2.
constexpr int64_t kSquare = 8;

struct TileIndex {
  int64_t row, column;
};

// Squares on and above the diagonal, column of squares by column of squares: square t is (row, column) with row <= column.
__device__ __forceinline__ TileIndex triangle_index(int64_t t) {
  int64_t column = int64_t((std::sqrt(8.0 * double(t) + 1.0) - 1.0) / 2);
  while ((column + 1) * (column + 2) / 2 <= t) ++column;
  while (column * (column + 1) / 2 > t) --column;
  return {t - column * (column + 1) / 2, column};
}

__device__ __forceinline__ TileIndex tile_index(int64_t t, const TileArguments& a) {
  const int64_t square = t / (kSquare * kSquare), within = t % (kSquare * kSquare);
  const int64_t squares_down = (a.row_tiles + kSquare - 1) / kSquare;
  const TileIndex s = a.self_form ? triangle_index(square) : TileIndex{square % squares_down, square / squares_down};
  return {s.row * kSquare + within % kSquare, s.column * kSquare + within / kSquare};
}

// Squares reach over the edges of what is to be computed.
__device__ __forceinline__ bool is_computed(const TileIndex& tile, const TileArguments& a) {
  return tile.row < a.row_tiles && tile.column < a.column_tiles && (!a.self_form || tile.row <= tile.column);
}

// The key of a value: larger values have larger keys.
__device__ __forceinline__ uint32_t ordered_bits(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The products that a thread holds: fragments of 16 x 8 as mma leaves them, kDown x kAcross of them.
template <int kDown, int kAcross>
struct Products {
  static constexpr int kRows = 2 * kDown, kColumns = 2 * kAcross;
  float fragment[kDown][kAcross][4];

  // Value (i, j) of this thread, and how far down and across it lies from its first.
  __device__ __forceinline__ float& at(int i, int j) { return fragment[i / 2][j / 2][i % 2 * 2 + j % 2]; }
  __device__ __forceinline__ static constexpr int row(int i) { return i / 2 * 16 + i % 2 * 8; }
  __device__ __forceinline__ static constexpr int column(int j) { return j / 2 * 8 + j % 2; }

  __device__ __forceinline__ void add(const Products& other) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) fragment[i][j][e] += other.fragment[i][j][e];
  }
};

// Where in the tile a thread's products begin.
struct Corner {
  int row, column;
};

// What reduce() looks for along one row (or column) of the tile held by `kLanes` lanes: the largest of this thread's `value(k)`
// over k < kCount, all lanes' best, and, where that equals or beats the key so far, the lowest index that has it.
template <int kCount, int kFirstBit, int kLastBit, class Value, class Index>
__device__ __forceinline__ void raise(unsigned long long* key, Value value, Index index, bool writes) {
  float best = -infinity<float>();
#pragma unroll
  for (int k = 0; k < kCount; ++k) best = fmaxf(best, value(k));
#pragma unroll
  for (int bits = kFirstBit; bits <= kLastBit; bits *= 2) best = fmaxf(best, __shfl_xor_sync(kAllLanes, best, bits));
  const bool improves = best > -infinity<float>() && ordered_bits(best) >= uint32_t(ptx::load_relaxed(key) >> 32);
  if (!__any_sync(kAllLanes, improves)) return;  // nearly always, once the search is under way
  uint32_t lowest = ~0u;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const uint32_t i = index(k);
    if (value(k) == best && i < lowest) lowest = i;
  }
#pragma unroll
  for (int bits = kFirstBit; bits <= kLastBit; bits *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, lowest, bits);
    if (other < lowest) lowest = other;
  }
  if (improves && writes) atomicMax(key, (unsigned long long)ordered_bits(best) << 32 | ~lowest);
}

// Looks for the largest (kPositive) or smallest values among the pairs that qualify, along the rows and, off the diagonal of the
// self form, along the columns.
template <bool kPositive, bool kMixed, class Values>
__device__ __forceinline__ void reduce(const TileDescription& tile, Values& values, const Corner& corner, unsigned long long* row_keys,
                                       unsigned long long* column_keys, bool diagonal) {
  const int lane = lane_index();
  const auto candidate = [&](int i, int j) {
    const float v = kPositive ? values.at(i, j) : -values.at(i, j);
    if (!kMixed) return v;
    const int r = corner.row + Values::row(i), c = corner.column + Values::column(j);
    const bool same = tile.label_id[0][r] == tile.label_id[1][c];
    const bool qualifies = kPositive ? same && !(diagonal && r == c) : !same;
    return qualifies ? v : -infinity<float>();
  };
#pragma unroll
  for (int i = 0; i < Values::kRows; ++i) {
    __syncwarp();  // keeps the compiler from interleaving rows, which would cost registers
    raise<Values::kColumns, 1, 2>(
        row_keys + Values::row(i), [&](int j) { return candidate(i, j); },
        [&](int j) { return uint32_t(tile.original[1][corner.column + Values::column(j)]); }, lane % 4 == 0);
  }
  if (column_keys == nullptr) return;
#pragma unroll
  for (int j = 0; j < Values::kColumns; ++j) {
    __syncwarp();
    raise<Values::kRows, 4, 16>(
        column_keys + Values::column(j), [&](int i) { return candidate(i, j); },
        [&](int i) { return uint32_t(tile.original[0][corner.row + Values::row(i)]); }, lane < 4);
  }
}

__device__ __forceinline__ void load_description(TileDescription& out, const TileArguments& a, const TileIndex& tile) {
  const int side = int(threadIdx.x) / int(kTileRows), r = int(threadIdx.x) % int(kTileRows);
  const PackedSet& set = side == 0 ? a.rows : a.columns;
  const int64_t position = (side == 0 ? tile.row : tile.column) * kTileRows + r;
  out.half_norm[side][r] = set.half_norm[position];
  out.scale[side][r] = set.scale[position];
  out.label_id[side][r] = set.label_id[position];
  out.original[side][r] = set.original[position];
}

// Turns products into values and looks through them.
template <class Products>
__device__ __forceinline__ void search_tile(const TileDescription& tile, Products& products, const Corner& corner,
                                            const TileArguments& a, const TileIndex& index) {
#pragma unroll
  for (int i = 0; i < Products::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Products::kColumns; ++j) {
      const int r = corner.row + Products::row(i), c = corner.column + Products::column(j);
      float& v = products.at(i, j);
      v = (tile.half_norm[0][r] + tile.half_norm[1][c]) - v * (tile.scale[0][r] * tile.scale[1][c]);
    }
  }
  const int last = int(kTileRows) - 1;
  const bool mixed = tile.label_id[0][0] <= tile.label_id[1][last] && tile.label_id[1][0] <= tile.label_id[0][last];
  const bool diagonal = a.self_form && index.row == index.column;  // its rows tell all there is
  const bool both = a.self_form && !diagonal;
  const int64_t row = index.row * kTileRows + corner.row, column = index.column * kTileRows + corner.column;
  unsigned long long *row_negative = a.negative + row, *column_negative = both ? a.negative + column : nullptr;
  if (mixed) {
    reduce<true, true>(tile, products, corner, a.positive + row, both ? a.positive + column : nullptr, diagonal);
    reduce<false, true>(tile, products, corner, row_negative, column_negative, diagonal);
  } else {
    reduce<false, false>(tile, products, corner, row_negative, column_negative, false);
  }
}

}  // namespace deepsim::cuda
