// Mining by wgmma (Hopper): tiles of 128 x 128 per block, 64 x 128 per warpgroup. Chunks of operands come by bulk copies, which need
// no more than one thread to start them: packing has left them as wgmma reads them. As many blocks as run at once take tile after
// tile; while one is searched, the first chunks of the next are on their way.
//
// The rows' operand is taken from registers: there the halves of a Split piece can change places (see pack.cuh).
#pragma once

#include "search_tile.cuh"

namespace deepsim::cuda {

using WgmmaProducts = Products<1, int(kTileRows) / 8>;

// Two chunks are on their way while one is multiplied.
constexpr int kWgmmaStages = 3;
constexpr int kStageBytes = 2 * int(kChunkTileBytes);
// Tiles that are known beforehand: this one, the two to which the next chunks may belong, and one more that is being added.
constexpr int kUpcoming = kWgmmaStages + 1;
// A product takes two pieces of a row.
constexpr int kSteps = kPieces / 2;

struct WgmmaShared {
  unsigned char stage[kWgmmaStages][2][kChunkTileBytes];  // rows, columns
  TileDescription description[2];                         // of this tile and the next, in turn
  // Chunk c of all that the block multiplies is in stage c % kWgmmaStages: `full` when it has come, `empty` when all warps have read
  // it; phase c / kWgmmaStages.
  ptx::Mbarrier full[kWgmmaStages], empty[kWgmmaStages];
  // The block's tiles: its i-th is at i % kUpcoming, down to row -1 behind the last. `next` is the first place that was not looked at.
  TileIndex upcoming[kUpcoming];
  int64_t next;
  // What is copied next: chunk `chunk` of the `loading`-th tile. It will be the `loaded`-th of all.
  int chunk, loading, loaded;
};

// The steps of one thread. What it remembers is in shared memory: registers are for products, and all threads have as many.

__device__ __forceinline__ void add_upcoming(WgmmaShared& shared, const TileArguments& a, int i) {
  TileIndex tile{-1, -1};
  for (; tile.row < 0 && shared.next < a.tiles; shared.next += gridDim.x) tile = tile_index(shared.next, a);
  shared.upcoming[i % kUpcoming] = tile;
}

__device__ __forceinline__ void load_next_chunk(WgmmaShared& shared, const TileArguments& a) {
  const TileIndex tile = shared.upcoming[shared.loading % kUpcoming];
  if (tile.row < 0) return;
  const int chunk = shared.chunk, loaded = shared.loaded, stage = loaded % kWgmmaStages;
  if (loaded >= kWgmmaStages) ptx::mbarrier_wait(&shared.empty[stage], loaded / kWgmmaStages - 1);
  ptx::mbarrier_arrive_expect(&shared.full[stage], kStageBytes);
  const auto copy = [&](int side, const PackedSet& set, int64_t position) {
    const unsigned char* from = set.operand + (position * a.chunks + chunk) * kChunkTileBytes;
    ptx::bulk_copy(shared.stage[stage][side], from, kChunkTileBytes, &shared.full[stage]);
  };
  copy(0, a.rows, tile.row);
  copy(1, a.columns, tile.column);
  const bool last = chunk + 1 == a.chunks;
  shared.loaded = loaded + 1;
  shared.chunk = last ? 0 : chunk + 1;
  if (last) ++shared.loading;
}

// Starts the products of one chunk. `a` and `swapped` are in use until they are done.
template <class Operand>
__device__ __forceinline__ void start_products(WgmmaProducts& products, uint32_t (&a)[kSteps][4], uint32_t (&swapped)[kSteps][4],
                                               const unsigned char (&stage)[2][kChunkTileBytes], bool accumulate) {
  int thread = int(threadIdx.x);
  ptx::forget(thread);  // see search
  const int lane = thread % kWarp, warp = thread / kWarp;
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
__device__ __forceinline__ void mine_wgmma(const TileArguments& a) {
  auto& shared = shared_memory<WgmmaShared>();
  const bool leads = threadIdx.x == 0;
  if (leads) {
    for (int stage = 0; stage < kWgmmaStages; ++stage) {
      ptx::mbarrier_init(&shared.full[stage], 1);
      ptx::mbarrier_init(&shared.empty[stage], kTileWarps);
    }
    ptx::mbarrier_init_fence();
    shared.next = blockIdx.x;
    shared.chunk = shared.loading = shared.loaded = 0;
    for (int i = 0; i < kUpcoming - 1; ++i) add_upcoming(shared, a, i);
  }
  __syncthreads();
  if (shared.upcoming[0].row < 0) return;
  if (leads) {
    for (int chunk = 0; chunk < kWgmmaStages - 1; ++chunk) load_next_chunk(shared, a);
  }
  load_description(shared.description[0], a, shared.upcoming[0]);
  __syncthreads();
  for (int i = 0; shared.upcoming[i % kUpcoming].row >= 0; ++i) {
    WgmmaProducts products = {}, sums = {};
    uint32_t operand[kSteps][4], swapped[kSteps][4];
    for (int chunk = 0; chunk < a.chunks; ++chunk) {
      const int multiplied = i * a.chunks + chunk, stage = multiplied % kWgmmaStages;
      ptx::mbarrier_wait(&shared.full[stage], multiplied / kWgmmaStages);
      start_products<Operand>(products, operand, swapped, shared.stage[stage], !kDeep && chunk > 0);
      // While they are made: the next chunk goes where the one before was, once the last warp is through with that.
      if (leads) load_next_chunk(shared, a);
      __syncwarp();
      ptx::wgmma_wait<0>(products.fragment[0]);
      if (lane_index() == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
      if constexpr (kDeep) sums.add(products);
    }
    const TileIndex next = shared.upcoming[(i + 1) % kUpcoming];
    if (next.row >= 0) load_description(shared.description[(i + 1) % 2], a, next);
    const int warp = int(threadIdx.x) / kWarp, lane = lane_index();
    const Corner corner{warp * 16 + lane / 4, lane % 4 * 2};
    search_tile(shared.description[i % 2], kDeep ? sums : products, corner, a);
    if (leads) add_upcoming(shared, a, i + kUpcoming - 1);
    __syncthreads();  // the next description is there, and nobody needs this one
  }
}

template <class Operand, bool kDeep>
__global__ void __launch_bounds__(kTileThreads, kBlocksAtOnce<kDeep>) mine_wgmma_kernel(TileArguments a) {
  if constexpr (kHasWgmma) {
    mine_wgmma<Operand, kDeep>(a);
  } else {
    __trap();  // rather than to have found nobody
  }
}

}  // namespace deepsim::cuda
