// Mining by mma.sync (Ampere and later): tiles of 128 x 128 per block, 64 x 32 per warp, chunks of operands by cp.async.
#pragma once

#include "search_tile.cuh"

namespace deepsim::cuda {

constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kWarpsAcross = int(kTileRows) / kWarpColumns;
constexpr int kRowFragments = kWarpRows / 16, kColumnFragments = kWarpColumns / 8;
using MmaProducts = Products<kRowFragments, kColumnFragments>;

// One chunk is on its way while one is multiplied. A third would leave room for one block only on an A100, and for none on GPUs with
// 100 KiB.
constexpr int kMmaStages = 2;

struct MmaShared {
  unsigned char stage[kMmaStages][2][kChunkTileBytes];
  TileDescription description;
};

// Starts copying one chunk of a tile's rows and columns.
__device__ __forceinline__ void load_stage(unsigned char (&stage)[2][kChunkTileBytes], const unsigned char* rows,
                                           const unsigned char* columns) {
  for (int offset = int(threadIdx.x) * kPieceBytes; offset < kChunkTileBytes; offset += kTileThreads * kPieceBytes) {
    ptx::cp_async_16(stage[0] + offset, rows + offset);
    ptx::cp_async_16(stage[1] + offset, columns + offset);
  }
}

template <class Operand>
__device__ __forceinline__ void multiply_stage(MmaProducts& products, const unsigned char (&stage)[2][kChunkTileBytes]) {
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
      for (int j = 0; j < kColumnFragments; ++j) ptx::mma(typename Operand::Element{}, products.fragment[i][j], a[i], b[j]);
    if constexpr (Operand::kSplit) {  // [h l] becomes [l h]: lanes 0, 1 of a row's four hold h, lanes 2, 3 hold l
#pragma unroll
      for (int j = 0; j < kColumnFragments; ++j) {
        b[j][0] = __shfl_xor_sync(kAllLanes, b[j][0], 2);
        b[j][1] = __shfl_xor_sync(kAllLanes, b[j][1], 2);
      }
#pragma unroll
      for (int i = 0; i < kRowFragments; ++i)
#pragma unroll
        for (int j = 0; j < kColumnFragments; ++j) ptx::mma(typename Operand::Element{}, products.fragment[i][j], a[i], b[j]);
    }
  }
}

// Block b works on stretch first + b of the walk, which is one tile.
template <class Operand, bool kDeep>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<kDeep>) mine_mma_kernel(TileArguments a, int64_t first) {
  auto& shared = shared_memory<MmaShared>();
  const TileIndex tile = tile_index(first + blockIdx.x, 0, a);
  if (tile.row < 0) return;
  const unsigned char* rows = a.rows.operand + tile.row * a.chunks * kChunkTileBytes;
  const unsigned char* columns = a.columns.operand + tile.column * a.chunks * kChunkTileBytes;
  const auto load = [&](int chunk) {
    if (chunk < a.chunks) {
      load_stage(shared.stage[chunk % kMmaStages], rows + chunk * kChunkTileBytes, columns + chunk * kChunkTileBytes);
    }
    ptx::cp_async_commit();  // a group for every chunk, also where there is none, keeps the count right
  };
  MmaProducts products = {}, sums = {};
  for (int chunk = 0; chunk < kMmaStages - 1; ++chunk) load(chunk);
  load_description(shared.description, a, tile);
  for (int chunk = 0; chunk < a.chunks; ++chunk) {
    ptx::cp_async_wait<kMmaStages - 2>();
    __syncthreads();  // this chunk is there for all, and nobody needs the one before
    load(chunk + kMmaStages - 1);
    multiply_stage<Operand>(products, shared.stage[chunk % kMmaStages]);
    if constexpr (kDeep) {
      sums.add(products);
      products = {};
    }
  }
  const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
  const Corner corner{warp / kWarpsAcross * kWarpRows + lane / 4, warp % kWarpsAcross * kWarpColumns + lane % 4 * 2};
  search_tile(shared.description, kDeep ? sums : products, corner, a);
}

}  // namespace deepsim::cuda
