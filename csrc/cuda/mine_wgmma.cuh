// Mining by wgmma (Hopper): tiles of 128 x 128 per block, 64 x 128 per warpgroup. Chunks of operands come by bulk copies, which need
// no more than one thread to start them: packing has left them as wgmma reads them.
//
// The rows' operand is taken from registers: there the halves of a Split piece can change places (see pack.cuh).
#pragma once

#include "search_tile.cuh"

namespace deepsim::cuda {

using WgmmaProducts = Products<1, int(kTileRows) / 8>;

// Two chunks are on their way while one is multiplied.
constexpr int kWgmmaStages = 3;
constexpr int kStageBytes = 2 * int(kChunkTileBytes);
// A product takes two pieces of a row.
constexpr int kSteps = kPieces / 2;

struct WgmmaShared {
  unsigned char stage[kWgmmaStages][2][kChunkTileBytes];  // rows, columns
  TileDescription description;
  // Chunk c is in stage c % kWgmmaStages: `full` when it has come, `empty` when all warps have read it; phase c / kWgmmaStages.
  ptx::Mbarrier full[kWgmmaStages], empty[kWgmmaStages];
};

// Starts the products of one chunk. `a` and `swapped` are in use until they are done.
template <class Operand>
__device__ __forceinline__ void start_products(WgmmaProducts& products, uint32_t (&a)[kSteps][4], uint32_t (&swapped)[kSteps][4],
                                               const unsigned char (&stage)[2][kChunkTileBytes], bool accumulate) {
  const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
  // Lanes 0-15 point ldmatrix at the warp's 16 rows, lanes 16-31 at the next piece of the same.
  const unsigned char* rows = stage[0] + (warp * 16 + lane % 16) * kChunkBytes;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::ldmatrix_x4(a[step], rows + ((2 * step + lane / 16) ^ (lane % 8)) * kPieceBytes);
    if constexpr (Operand::kSplit) {  // [h l] becomes [l h]: lanes 0, 1 of a row's four hold h, lanes 2, 3 hold l
#pragma unroll
      for (int r = 0; r < 4; ++r) swapped[step][r] = __shfl_xor_sync(kAllLanes, a[step][r], 2);
    }
  }
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const unsigned char* columns = stage[1] + 2 * step * kPieceBytes;
    ptx::wgmma(typename Operand::Element{}, products.fragment[0], a[step], columns, accumulate || step > 0);
    if constexpr (Operand::kSplit) ptx::wgmma(typename Operand::Element{}, products.fragment[0], swapped[step], columns, true);
  }
  ptx::wgmma_commit();
}

template <class Operand, bool kDeep>
__device__ __forceinline__ void mine_wgmma(const TileArguments& a, int64_t first) {
  auto& shared = shared_memory<WgmmaShared>();
  const TileIndex tile = tile_index(first + blockIdx.x, a);
  if (!is_computed(tile, a)) return;
  load_description(shared.description, a, tile);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kWgmmaStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kTileWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  const unsigned char* rows = a.rows.operand + tile.row * a.chunks * kChunkTileBytes;
  const unsigned char* columns = a.columns.operand + tile.column * a.chunks * kChunkTileBytes;
  const auto load = [&](int chunk) {
    const int stage = chunk % kWgmmaStages;
    ptx::mbarrier_arrive_expect(&shared.full[stage], kStageBytes);
    ptx::bulk_copy(shared.stage[stage][0], rows + chunk * kChunkTileBytes, kChunkTileBytes, &shared.full[stage]);
    ptx::bulk_copy(shared.stage[stage][1], columns + chunk * kChunkTileBytes, kChunkTileBytes, &shared.full[stage]);
  };
  const bool loads = threadIdx.x == 0;
  if (loads) {
    for (int chunk = 0; chunk < kWgmmaStages - 1 && chunk < a.chunks; ++chunk) load(chunk);
  }
  const int lane = lane_index(), warp = int(threadIdx.x) / kWarp;
  WgmmaProducts products = {}, sums = {};
  uint32_t operand[kSteps][4], swapped[kSteps][4];
  for (int chunk = 0; chunk < a.chunks; ++chunk) {
    const int stage = chunk % kWgmmaStages;
    ptx::mbarrier_wait(&shared.full[stage], chunk / kWgmmaStages);
    start_products<Operand>(products, operand, swapped, shared.stage[stage], !kDeep && chunk > 0);
    // While they are made: the next chunk goes where the one before was, once the last warp is through with that.
    const int next = chunk + kWgmmaStages - 1;
    if (loads && next < a.chunks) {
      if (chunk > 0) ptx::mbarrier_wait(&shared.empty[next % kWgmmaStages], next / kWgmmaStages - 1);
      load(next);
    }
    __syncwarp();
    ptx::wgmma_wait<0>(products.fragment[0]);
    if (lane == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
    if constexpr (kDeep) sums.add(products);
  }
  const Corner corner{warp * 16 + lane / 4, lane % 4 * 2};
  search_tile(shared.description, kDeep ? sums : products, corner, a, tile);
}

// Block b works on tile first + b.
template <class Operand, bool kDeep>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<kDeep>) mine_wgmma_kernel(TileArguments a, int64_t first) {
  if constexpr (kHasWgmma) mine_wgmma<Operand, kDeep>(a, first);
}

}  // namespace deepsim::cuda
