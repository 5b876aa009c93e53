// Mining by wgmma (Hopper): tiles of 128 x 128 per block, 64 x 128 per warpgroup. Chunks of operands come by bulk copies, which need
// no more than one thread to start them: packing has left them as wgmma reads them. As many blocks as run at once take tile after
// tile; while one is searched, the first chunks of the next are on their way. Rows of few chunks stay in shared memory for all tiles
// of a stretch: what comes from L2, which then is all that tiles wait for, is little more than half.
//
// The rows' operand is taken from registers: there the halves of a Split piece can change places (see pack.cuh).
#pragma once

#include "search_tile.cuh"

namespace deepsim::cuda {

using WgmmaProducts = Products<1, int(kTileRows) / 8>;

// Two chunks are on their way while one is multiplied.
constexpr int kWgmmaStages = 3;
// Tiles that are known beforehand: this one, the two to which the next chunks may belong, and one more that is being added.
constexpr int kUpcoming = kWgmmaStages + 1;
// A product takes two pieces of a row.
constexpr int kSteps = kPieces / 2;

// A tile that the block will come to.
struct Upcoming {
  TileIndex tile;  // row -1: there is none
  int rows_at;     // the rows' first chunk is the so many-th of rows that the block loads
  bool new_rows;   // not those of the tile before, or those have not stayed
};

struct WgmmaShared {
  // Chunk c of all columns that the block multiplies is in stage c % kWgmmaStages: `full` when it has come, and that of rows with it,
  // `empty` when all warps have read both; phase c / kWgmmaStages. Chunk c of all rows is in stage c % kWgmmaStages of its own.
  unsigned char rows[kWgmmaStages][kChunkTileBytes], columns[kWgmmaStages][kChunkTileBytes];
  TileDescription description[2];  // of this tile and the next, in turn
  ptx::Mbarrier full[kWgmmaStages], empty[kWgmmaStages];
  // The block's tiles: its i-th is at i % kUpcoming. What was not looked at begins at tile `step` of stretch `stretch`.
  Upcoming upcoming[kUpcoming];
  int64_t stretch;
  int step;
  // What is copied next: chunk `chunk` of the `loading`-th tile. It will be the `loaded`-th of all.
  int chunk, loading, loaded;
};

// The steps of one thread. What it remembers is in shared memory: registers are for products, and all threads have as many.

__device__ __forceinline__ void add_upcoming(WgmmaShared& shared, const TileArguments& a, int i) {
  TileIndex tile{-1, -1};
  while (tile.row < 0 && shared.stretch < a.stretches) {
    tile = tile_index(shared.stretch, shared.step, a);
    const bool goes_on = shared.step + 1 < steps_of(shared.stretch, a);
    shared.step = goes_on ? shared.step + 1 : 0;
    if (!goes_on) shared.stretch += gridDim.x;
  }
  Upcoming next{tile, 0, true};
  if (i > 0) {
    const Upcoming& before = shared.upcoming[(i - 1) % kUpcoming];
    next.new_rows = tile.row != before.tile.row || a.chunks > kWgmmaStages;
    next.rows_at = before.rows_at + (next.new_rows ? a.chunks : 0);
  }
  shared.upcoming[i % kUpcoming] = next;
}

// Goes where columns were that all have read. With them all have read the rows that stood where new ones go, the third of their chunks
// before: these were last read together with the third chunk of columns before, or earlier.
__device__ __forceinline__ void load_next_chunk(WgmmaShared& shared, const TileArguments& a) {
  const Upcoming& next = shared.upcoming[shared.loading % kUpcoming];
  if (next.tile.row < 0) return;
  const int chunk = shared.chunk, loaded = shared.loaded, stage = loaded % kWgmmaStages;
  if (loaded >= kWgmmaStages) ptx::mbarrier_wait(&shared.empty[stage], loaded / kWgmmaStages - 1);
  ptx::mbarrier_arrive_expect(&shared.full[stage], int(kChunkTileBytes) * (next.new_rows ? 2 : 1));
  const auto copy = [&](unsigned char* to, const PackedSet& set, int64_t tile) {
    ptx::bulk_copy(to, set.operand + (tile * a.chunks + chunk) * kChunkTileBytes, int(kChunkTileBytes), &shared.full[stage]);
  };
  if (next.new_rows) copy(shared.rows[(next.rows_at + chunk) % kWgmmaStages], a.rows, next.tile.row);
  copy(shared.columns[stage], a.columns, next.tile.column);
  const bool last = chunk + 1 == a.chunks;
  shared.loaded = loaded + 1;
  shared.chunk = last ? 0 : chunk + 1;
  if (last) ++shared.loading;
}

// Starts the products of one chunk. `a` and `swapped` are in use until they are done.
template <class Operand>
__device__ __forceinline__ void start_products(WgmmaProducts& products, uint32_t (&a)[kSteps][4], uint32_t (&swapped)[kSteps][4],
                                               const unsigned char* row_chunk, const unsigned char* column_chunk, bool accumulate) {
  int thread = int(threadIdx.x);
  ptx::forget(thread);  // see search
  const int lane = thread % kWarp, warp = thread / kWarp;
  // Lanes 0-15 point ldmatrix at the warp's 16 rows, lanes 16-31 at the next piece of the same.
  const unsigned char* rows = row_chunk + (warp * 16 + lane % 16) * kChunkBytes;
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
    const unsigned char* columns = column_chunk + 2 * step * kPieceBytes;
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
    shared.stretch = blockIdx.x;
    shared.step = shared.chunk = shared.loading = shared.loaded = 0;
    for (int i = 0; i < kUpcoming - 1; ++i) add_upcoming(shared, a, i);
  }
  __syncthreads();
  if (shared.upcoming[0].tile.row < 0) return;
  if (leads) {
    for (int chunk = 0; chunk < kWgmmaStages - 1; ++chunk) load_next_chunk(shared, a);
  }
  load_description(shared.description[0], a, shared.upcoming[0].tile);
  __syncthreads();
  // While the first products are made, if their operands leave registers for it.
  constexpr bool kEarly = !Operand::kSplit || kDeep;
  const auto prepare_next = [&](int i) {
    const TileIndex next = shared.upcoming[(i + 1) % kUpcoming].tile;
    if (next.row >= 0) load_description(shared.description[(i + 1) % 2], a, next);
    if (leads) add_upcoming(shared, a, i + kUpcoming - 1);
  };
  for (int i = 0; shared.upcoming[i % kUpcoming].tile.row >= 0; ++i) {
    const int rows_at = shared.upcoming[i % kUpcoming].rows_at;
    WgmmaProducts products = {}, sums = {};
    uint32_t operand[kSteps][4], swapped[kSteps][4];
    for (int chunk = 0; chunk < a.chunks; ++chunk) {
      const int multiplied = i * a.chunks + chunk, stage = multiplied % kWgmmaStages;
      ptx::mbarrier_wait(&shared.full[stage], multiplied / kWgmmaStages);
      start_products<Operand>(products, operand, swapped, shared.rows[(rows_at + chunk) % kWgmmaStages], shared.columns[stage],
                              !kDeep && chunk > 0);
      // While they are made: the next chunk goes where the one before was, once the last warp is through with that.
      if (leads) load_next_chunk(shared, a);
      if (kEarly && chunk == 0) prepare_next(i);
      __syncwarp();
      ptx::wgmma_wait<0>(products.fragment[0]);
      if (lane_index() == 0) ptx::mbarrier_arrive(&shared.empty[stage]);
      if constexpr (kDeep) sums.add(products);
    }
    if (!kEarly) prepare_next(i);
    const int warp = int(threadIdx.x) / kWarp, lane = lane_index();
    const Corner corner{warp * 16 + lane / 4, lane % 4 * 2};
    search_tile(shared.description[i % 2], kDeep ? sums : products, corner, a);
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
