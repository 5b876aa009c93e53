// Batch-hard mining over symmetric tiles of tensor-core products. A tile of distances never leaves the registers.
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

// 128 x 128 per block, 64 x 32 per warp: as many accumulators as leave room for two blocks on a multiprocessor.
constexpr int kTileThreads = 256;
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kWarpsAcross = int(kTileRows) / kWarpColumns;
constexpr int kRowFragments = kWarpRows / 16, kColumnFragments = kWarpColumns / 8;
// One chunk is on its way while one is multiplied; the second block on the multiprocessor hides the rest. A third would leave room
// for one block only on an A100, and for none on GPUs with 100 KiB.
constexpr int kStages = 2;

struct TileShared {
  unsigned char stage[kStages][2][kChunkTileBytes];
  // Of the tile's rows, then of its columns.
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

// The key of a value: larger values have larger keys.
__device__ __forceinline__ uint32_t ordered_bits(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Where this thread's accumulators lie in the tile.
struct Fragment {
  static constexpr int kRows = 2 * kRowFragments, kColumns = 2 * kColumnFragments;
  int first_row, first_column;

  __device__ __forceinline__ static constexpr int row(int i) { return i / 2 * 16 + i % 2 * 8; }
  __device__ __forceinline__ static constexpr int column(int j) { return j / 2 * 8 + j % 2; }
};
using Accumulators = float[kRowFragments][kColumnFragments][4];

__device__ __forceinline__ float& at(Accumulators& a, int i, int j) { return a[i / 2][j / 2][i % 2 * 2 + j % 2]; }

// Starts copying one chunk of a tile's rows and columns.
__device__ __forceinline__ void load_stage(unsigned char (&stage)[2][kChunkTileBytes], const unsigned char* rows,
                                           const unsigned char* columns) {
  for (int offset = int(threadIdx.x) * kPieceBytes; offset < kChunkTileBytes; offset += kTileThreads * kPieceBytes) {
    ptx::cp_async_16(stage[0] + offset, rows + offset);
    ptx::cp_async_16(stage[1] + offset, columns + offset);
  }
}

template <class Operand>
__device__ __forceinline__ void multiply_stage(Accumulators& products, const unsigned char (&stage)[2][kChunkTileBytes]) {
  const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
  // Lanes 0-15 point ldmatrix at a fragment's 16 rows, lanes 16-31 at the next piece of the same; for columns, which come as two
  // fragments of 8, lanes 0-7 and 16-23 at their rows, the others at the next piece.
  const unsigned char* rows = stage[0] + (warp / kWarpsAcross * kWarpRows + lane % 16) * kChunkBytes;
  const unsigned char* columns = stage[1] + (warp % kWarpsAcross * kWarpColumns + lane / 16 * 8 + lane % 8) * kChunkBytes;
  for (int piece = 0; piece < kPieces; piece += 2) {
    uint32_t a[kRowFragments][4], b[kColumnFragments][2];
    const int row_piece = (piece + lane / 16) ^ (lane % 8), column_piece = (piece + lane / 8 % 2) ^ (lane % 8);
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i) {
      ptx::ldmatrix_x4(a[i], rows + i * 16 * kChunkBytes + row_piece * kPieceBytes);
    }
#pragma unroll
    for (int j = 0; j < kColumnFragments; j += 2) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, columns + j * 8 * kChunkBytes + column_piece * kPieceBytes);
      b[j][0] = r[0];
      b[j][1] = r[1];
      b[j + 1][0] = r[2];
      b[j + 1][1] = r[3];
    }
#pragma unroll
    for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j) ptx::mma(typename Operand::Element{}, products[i][j], a[i], b[j]);
    if constexpr (Operand::kSplit) {  // [h l] becomes [l h]: lanes 0, 1 of a row's four hold h, lanes 2, 3 hold l
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j) {
        b[j][0] = __shfl_xor_sync(kAllLanes, b[j][0], 2);
        b[j][1] = __shfl_xor_sync(kAllLanes, b[j][1], 2);
      }
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) ptx::mma(typename Operand::Element{}, products[i][j], a[i], b[j]);
    }
  }
}

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
template <bool kPositive, bool kMixed>
__device__ __forceinline__ void reduce(const TileShared& shared, Accumulators& values, const Fragment& f, unsigned long long* row_keys,
                                       unsigned long long* column_keys, bool diagonal) {
  const int lane = lane_index();
  const auto candidate = [&](int i, int j) {
    const float v = kPositive ? at(values, i, j) : -at(values, i, j);
    if (!kMixed) return v;
    const int r = f.first_row + Fragment::row(i), c = f.first_column + Fragment::column(j);
    const bool same = shared.label_id[0][r] == shared.label_id[1][c];
    const bool qualifies = kPositive ? same && !(diagonal && r == c) : !same;
    return qualifies ? v : -infinity<float>();
  };
#pragma unroll
  for (int i = 0; i < Fragment::kRows; ++i) {
    __syncwarp();  // keeps the compiler from interleaving rows, which would cost registers
    raise<Fragment::kColumns, 1, 2>(
        row_keys + Fragment::row(i), [&](int j) { return candidate(i, j); },
        [&](int j) { return uint32_t(shared.original[1][f.first_column + Fragment::column(j)]); }, lane % 4 == 0);
  }
  if (column_keys == nullptr) return;
#pragma unroll
  for (int j = 0; j < Fragment::kColumns; ++j) {
    __syncwarp();
    raise<Fragment::kRows, 4, 16>(
        column_keys + Fragment::column(j), [&](int i) { return candidate(i, j); },
        [&](int i) { return uint32_t(shared.original[0][f.first_row + Fragment::row(i)]); }, lane < 4);
  }
}

__device__ __forceinline__ void load_description(TileShared& shared, const TileArguments& a, const TileIndex& tile) {
  const int side = int(threadIdx.x) / int(kTileRows), r = int(threadIdx.x) % int(kTileRows);
  const PackedSet& set = side == 0 ? a.rows : a.columns;
  const int64_t position = (side == 0 ? tile.row : tile.column) * kTileRows + r;
  shared.half_norm[side][r] = set.half_norm[position];
  shared.scale[side][r] = set.scale[position];
  shared.label_id[side][r] = set.label_id[position];
  shared.original[side][r] = set.original[position];
}

// Turns products into values and looks through them.
__device__ __forceinline__ void search_tile(const TileShared& shared, Accumulators& products, const Fragment& f,
                                            const TileArguments& a, const TileIndex& tile) {
#pragma unroll
  for (int i = 0; i < Fragment::kRows; ++i) {
#pragma unroll
    for (int j = 0; j < Fragment::kColumns; ++j) {
      const int r = f.first_row + Fragment::row(i), c = f.first_column + Fragment::column(j);
      float& v = at(products, i, j);
      v = (shared.half_norm[0][r] + shared.half_norm[1][c]) - v * (shared.scale[0][r] * shared.scale[1][c]);
    }
  }
  const int last = int(kTileRows) - 1;
  const bool mixed = shared.label_id[0][0] <= shared.label_id[1][last] && shared.label_id[1][0] <= shared.label_id[0][last];
  const bool diagonal = a.self_form && tile.row == tile.column;  // its rows tell all there is
  const bool both = a.self_form && !diagonal;
  const int64_t row = tile.row * kTileRows + f.first_row, column = tile.column * kTileRows + f.first_column;
  unsigned long long *row_negative = a.negative + row, *column_negative = both ? a.negative + column : nullptr;
  if (mixed) {
    reduce<true, true>(shared, products, f, a.positive + row, both ? a.positive + column : nullptr, diagonal);
    reduce<false, true>(shared, products, f, row_negative, column_negative, diagonal);
  } else {
    reduce<false, false>(shared, products, f, row_negative, column_negative, false);
  }
}

// Block b works on tile first + b.
template <class Operand>
__global__ void __launch_bounds__(kTileThreads, 2) mine_tiles_kernel(TileArguments a, int64_t first) {
  auto& shared = shared_memory<TileShared>();
  const TileIndex tile = tile_index(first + blockIdx.x, a);
  if (tile.row >= a.row_tiles || tile.column >= a.column_tiles || (a.self_form && tile.row > tile.column)) return;
  load_description(shared, a, tile);
  const unsigned char* rows = a.rows.operand + tile.row * a.chunks * kChunkTileBytes;
  const unsigned char* columns = a.columns.operand + tile.column * a.chunks * kChunkTileBytes;
  const auto load = [&](int chunk) {
    if (chunk < a.chunks) {
      load_stage(shared.stage[chunk % kStages], rows + chunk * kChunkTileBytes, columns + chunk * kChunkTileBytes);
    }
    ptx::cp_async_commit();  // a group for every chunk, also where there is none, keeps the count right
  };
  Accumulators products = {};
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  for (int chunk = 0; chunk < a.chunks; ++chunk) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this chunk is there for all, and nobody needs the one before
    load(chunk + kStages - 1);
    multiply_stage<Operand>(products, shared.stage[chunk % kStages]);
  }
  const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
  const Fragment fragment{warp / kWarpsAcross * kWarpRows + lane / 4, warp % kWarpsAcross * kWarpColumns + lane % 4 * 2};
  search_tile(shared, products, fragment, a, tile);
}

}  // namespace deepsim::cuda
