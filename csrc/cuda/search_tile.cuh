// What mining does with a tile of tensor-core products: which tile a block has, and the search of its values. A tile of distances
// never leaves the registers. mine_mma.cuh and mine_wgmma.cuh make the products.
//
// With h = |x|^2 / 2 and rows of operand a and b, the value of a pair is e = h_i + h_j - s_i s_j (a b) = |x_i - x_j|^2 / 2, the same
// bits for (i, j) and (j, i). Rows are sorted by label: a tile either holds no positive at all, and is searched for its smallest
// values only, or it is mixed. In the self form only tiles on and above the diagonal are computed. A tile is searched for its rows and,
// where they have keys, for its columns.
//
// The best of an anchor is kept in global memory as one 64-bit key (key.cuh) that atomicMax raises. A tile reads what has been found
// when it begins. Most tiles hold nothing better, for which a thread compares each of its values with what its row and its column
// have; then nobody waits. Values that are better meet in shared memory first, and few go on to global memory from there.
#pragma once

#include "key.cuh"
#include "pack.cuh"

namespace deepsim::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileWarps = kTileThreads / kWarp;

// Tensor cores cut sums off instead of rounding them. Where all terms have one sign, a product of rows of kShallow columns is short
// by up to 8e-6 of itself (5e-6 by wgmma), which selection to 1e-5 can bear; longer rows of Split operands are `deep`: each chunk is
// summed for itself and then added to a second set of registers. That leaves room for one block on a multiprocessor. Otherwise there are
// two, which hide each other's waiting.
constexpr int kShallow = 384;
template <bool kDeep>
constexpr int kBlocksAtOnce = kDeep ? 1 : 2;

// What is known of the tile's rows, then of its columns.
struct TileDescription {
  int64_t first[2];  // packed position
  float2 half_norm_and_scale[2][kTileRows];
  int32_t label_id[2][kTileRows], original[2][kTileRows];
  // The largest value of a positive and the smallest of a negative: when the tile began, and by now, as the integers that floats
  // without a sign are. Where none had been found, any value is larger, and smaller.
  float farthest[2][kTileRows], nearest[2][kTileRows];
  int32_t farthest_now[2][kTileRows], nearest_now[2][kTileRows];
};

struct TileArguments {
  PackedSet rows, columns;
  int64_t row_tiles, column_tiles;
  // The walk: tiles beside the diagonal, then those of the squares by stretches of a row, 2^stretch_bits tiles that a block takes one
  // after another.
  int64_t beside_diagonal, stretches;
  int stretch_bits;
  int chunks;  // of a row of the operands
  bool self_form;
  Keys row_keys, column_keys;  // the same in the self form
};

// Tiles are walked in squares, so that the blocks that run together share what is in L2. In the self form those beside the diagonal come
// before: they tell every row and column how good a value has to be. Where nothing is known all values are better, and a tile takes
// several times as long; without these half of the tiles would begin so at N=16,384.
constexpr int kSquareBits = 3;
constexpr int64_t kSquare = 1 << kSquareBits;

struct TileIndex {
  int64_t row, column;
};

// Squares on and above the diagonal, column of squares by column of squares: square t is (row, column) with row <= column.
__device__ __forceinline__ TileIndex triangle_index(int64_t t) {
  int64_t column = int64_t((std::sqrt(8.0f * float(t) + 1.0f) - 1.0f) / 2);  // a column more or less
  while ((column + 1) * (column + 2) / 2 <= t) ++column;
  while (column * (column + 1) / 2 > t) --column;
  return {t - column * (column + 1) / 2, column};
}

// Tile `step` of a stretch of the walk; row -1 if that is over an edge, below the diagonal, or one that came before.
__device__ __forceinline__ TileIndex tile_index(int64_t stretch, int step, const TileArguments& a) {
  if (stretch < a.beside_diagonal) return {stretch, stretch + 1};
  stretch -= a.beside_diagonal;
  const int of_square = 2 * kSquareBits - a.stretch_bits;  // a logarithm: nothing here is worth a division
  const int64_t square = stretch >> of_square, within = stretch & ((int64_t(1) << of_square) - 1);
  const int64_t squares_down = (a.row_tiles + kSquare - 1) / kSquare;
  const TileIndex s = a.self_form ? triangle_index(square) : TileIndex{square % squares_down, square / squares_down};
  const TileIndex tile{s.row * kSquare + within % kSquare, s.column * kSquare + (within / kSquare << a.stretch_bits) + step};
  const bool outside = tile.row >= a.row_tiles || tile.column >= a.column_tiles;
  const bool elsewhere = a.self_form && (tile.row > tile.column || tile.row + 1 == tile.column);
  return outside || elsewhere ? TileIndex{-1, -1} : tile;
}

__device__ __forceinline__ int steps_of(int64_t stretch, const TileArguments& a) {
  return stretch < a.beside_diagonal ? 1 : 1 << a.stretch_bits;
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

// Makes v the best of row (column) r of the tile if nobody there has a better one. Products of rows so near to each other that v has
// no digit left may be below 0; which of them is first does not matter, as their anchors choose again (choose_again.cuh).
__device__ __forceinline__ void raise(TileDescription& tile, bool positive, int side, int r, float v, int32_t index,
                                      unsigned long long* keys) {
  v = fmaxf(v, 0.0f);
  const int32_t bits = int32_t(__float_as_uint(v));
  int32_t& now = positive ? tile.farthest_now[side][r] : tile.nearest_now[side][r];
  const auto better = [&](int32_t than) { return positive ? bits >= than : bits <= than; };
  if (!better(ptx::load_relaxed_shared(&now))) return;  // where nothing was known at first, most are not: a load waits for no other
  if (better(positive ? atomicMax(&now, bits) : atomicMin(&now, bits))) {
    atomicMax(keys + tile.first[side] + r, key_of(positive ? v : -v, uint32_t(index)));
  }
}

// Of a pair.
__device__ __forceinline__ float value(float2 row, float2 column, float product) {
  return (row.x + column.x) - product * (row.y * column.y);
}

// A thread's values in groups of two rows and two columns.
template <class Products>
struct Groups {
  static constexpr int kDown = Products::kRows / 2, kAcross = Products::kColumns / 2, kCount = kDown * kAcross;
  static_assert(kCount <= 32, "a bit for each");
};

// Looks for the largest values (of positives) or smallest among the pairs that qualify, along the rows and, where they have keys, along the
// columns: first for the groups in which there is anything better than what was found before, then for what that is. The second part
// is not done on the way, as its code would stand there for every group, and the few instructions of the first would be far apart.
template <bool kMixed, class Products>
__device__ __forceinline__ void search(TileDescription& tile, Products& products, Corner corner, const TileArguments& a, bool positive,
                                       bool diagonal) {
  // Where each value's row and column stand in shared memory would otherwise be computed before the loop over tiles, and fill the
  // registers that products need.
  ptx::forget(corner.row);
  ptx::forget(corner.column);
  using G = Groups<Products>;
  const auto& known = tile.half_norm_and_scale;
  const auto& found = positive ? tile.farthest : tile.nearest;
  const float sign = positive ? 1 : -1;
  const auto better = [&](float v, float than) { return sign * v >= sign * than; };
  const auto qualifies = [&](int r, int c) -> bool {
    if (!kMixed) return true;
    const bool same = tile.label_id[0][r] == tile.label_id[1][c];
    return (same == positive) & !(positive & diagonal & (r == c));
  };
  unsigned long long* row_keys = positive ? a.row_keys.positive : a.row_keys.negative;
  unsigned long long* column_keys = positive ? a.column_keys.positive : a.column_keys.negative;
  uint32_t groups = 0;
#pragma unroll
  for (int down = 0; down < G::kDown; ++down) {
    float2 row[2];
    float of_row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = corner.row + Products::row(2 * down + i);
      row[i] = known[0][r];
      of_row[i] = found[0][r];
    }
#pragma unroll
    for (int across = 0; across < G::kAcross; ++across) {
      __syncwarp();  // keeps the compiler from interleaving groups, which would cost registers
      bool any = false;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int c = corner.column + Products::column(2 * across + j);
        const float2 column = known[1][c];
        const float of_column = found[1][c];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float v = value(row[i], column, products.at(2 * down + i, 2 * across + j));
          // Without && and ||, which would be branches.
          any |= (better(v, of_row[i]) | better(v, of_column)) & qualifies(corner.row + Products::row(2 * down + i), c);
        }
      }
      groups |= uint32_t(any) << (down * G::kAcross + across);
    }
  }
#pragma unroll 1
  for (; groups != 0; groups &= groups - 1) {
    const int group = __ffs(groups) - 1;
    float product[2][2] = {};
#pragma unroll
    for (int g = 0; g < G::kCount; ++g) {  // registers have no index
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j)
          if (g == group) product[i][j] = products.at(g / G::kAcross * 2 + i, g % G::kAcross * 2 + j);
    }
#pragma unroll 1
    for (int e = 0; e < 4; ++e) {
      const int r = corner.row + Products::row(group / G::kAcross * 2 + e / 2);
      const int c = corner.column + Products::column(group % G::kAcross * 2 + e % 2);
      const float2 products_of_row = e / 2 == 0 ? float2{product[0][0], product[0][1]} : float2{product[1][0], product[1][1]};
      const float v = value(known[0][r], known[1][c], e % 2 == 0 ? products_of_row.x : products_of_row.y);
      if (!qualifies(r, c)) continue;
      if (better(v, found[0][r])) raise(tile, positive, 0, r, v, tile.original[1][c], row_keys);
      if (better(v, found[1][c])) raise(tile, positive, 1, c, v, tile.original[0][r], column_keys);
    }
  }
}

__device__ __forceinline__ void load_description(TileDescription& out, const TileArguments& a, const TileIndex& tile) {
  int thread = int(threadIdx.x);
  ptx::forget(thread);  // see search
  const int side = thread / int(kTileRows), r = thread % int(kTileRows);
  const PackedSet& set = side == 0 ? a.rows : a.columns;
  const int64_t first = (side == 0 ? tile.row : tile.column) * kTileRows, position = first + r;
  // Before what is found so far, as nothing passes a relaxed load: all are on their way together.
  const float2 half_norm_and_scale{set.half_norm[position], set.scale[position]};
  const int32_t label_id = set.label_id[position], original = set.original[position];
  float farthest = -largest_float(), nearest = largest_float();
  const Keys& keys = side == 0 ? a.row_keys : a.column_keys;
  if (keys.positive) {
    const unsigned long long positive = ptx::load_relaxed(keys.positive + position), negative = ptx::load_relaxed(keys.negative + position);
    if (positive != 0) farthest = value_of_key(positive);
    if (negative != 0) nearest = -value_of_key(negative);
  } else {  // who looks for nobody: no value compares with these
    farthest = nearest = not_a_number<float>();
  }
  if (r == 0) out.first[side] = first;
  out.half_norm_and_scale[side][r] = half_norm_and_scale;
  out.label_id[side][r] = label_id;
  out.original[side][r] = original;
  out.farthest[side][r] = farthest;
  out.nearest[side][r] = nearest;
  out.farthest_now[side][r] = int32_t(__float_as_uint(farthest));
  out.nearest_now[side][r] = int32_t(__float_as_uint(nearest));
}

// Makes values of products and looks through them.
template <class Products>
__device__ __forceinline__ void search_tile(TileDescription& tile, Products& products, Corner corner, const TileArguments& a) {
  const int last = int(kTileRows) - 1;
  const bool mixed = tile.label_id[0][0] <= tile.label_id[1][last] && tile.label_id[1][0] <= tile.label_id[0][last];
  const bool diagonal = a.self_form && tile.first[0] == tile.first[1];
  if (mixed) {
#pragma unroll 1
    for (int positive = 1; positive >= 0; --positive) search<true>(tile, products, corner, a, positive != 0, diagonal);
  } else {
    search<false>(tile, products, corner, a, false, diagonal);
  }
}

}  // namespace deepsim::cuda
