// Batch-hard triplet loss on CUDA: which kernels run, in which order, on how many blocks.
#include "batch_hard.h"

#include <algorithm>

#include "centre.cuh"
#include "choose_again.cuh"
#include "dispatch.cuh"
#include "extremes.cuh"
#include "mine_direct.cuh"
#include "mine_mma.cuh"
#include "mine_wgmma.cuh"
#include "pack.cuh"
#include "sort_by_rank.cuh"
#include "triplets.cuh"

namespace deepsim::cuda {
namespace {

constexpr int kWarpKernelThreads = 256;
constexpr int kWarpKernelRows = kWarpKernelThreads / kWarp;

template <class S>
void norms_of(const Rows& x, double* norms, Flags* flags, void* stream) {
  if (x.count == 0) return;
  launch(norms_kernel<S>, blocks_for(x.count, kWarpKernelRows), kWarpKernelThreads, 0, stream, x, norms, flags);
}

template <class S, class Choices>
void finish(const Batch& batch, const Choices& choices, const Triplets& out, const LossOptions& options, void* stream) {
  launch(finish_kernel<S, Choices>, loss_parts(batch.anchors.count), kRowThreads, sizeof(LossShared), stream, batch, choices, out, options);
}

// Calls f with a value of the storage's element type and of the operand that its rows become.
template <class F>
void with_operand(Storage storage, bool single_pass, F f) {
  switch (storage) {
    case Storage::float32: return single_pass ? f(float{}, Plain<Half>{}) : f(float{}, Split{});
    case Storage::bfloat16: return f(BFloat16{}, Plain<BFloat16>{});
    case Storage::float16: return f(Half{}, Plain<Half>{});
    case Storage::float64: throw std::logic_error("deepsim_ext: there are no float64 tiles");
  }
}

template <class S, class Operand>
void pack(const Batch& batch, const TileMining& mining, bool of_anchors, void* stream) {
  PackArguments p;
  p.rows = of_anchors ? batch.anchors : batch.references;
  p.norms = of_anchors ? batch.anchor_norm : batch.reference_norm;
  p.centre = mining.centre.at;
  p.out = of_anchors ? mining.anchors : mining.references;
  p.keys = of_anchors ? mining.anchor_keys : mining.reference_keys;
  p.column_labels = mining.references.sorted_labels;
  p.column_count = batch.references.count;
  p.flags = batch.flags;
  launch(pack_kernel<S, Operand>, blocks_for(padded_rows(p.rows.count), 8), 8 * kWarp, 0, stream, p);
}

template <class T, class Choices>
void write_extremes(int64_t rows, const Choices& choices, const float* half_norms, const Flags* flags, const Extremes& out, void* stream) {
  if (rows > 0) launch(extremes_kernel<T, Choices>, blocks_for(rows, 256), 256, 0, stream, rows, choices, half_norms, flags, out);
}

// Of one launch; CUDA takes fewer than 2^31.
constexpr int64_t kMostBlocks = int64_t(1) << 30;

template <class T>
void launch_sort(const T* numbers, int64_t count, const Runs<T>& room, T* sorted, int64_t* order, void* stream) {
  launch(sort_runs_kernel<T>, blocks_for(count, kRankThreads), kRankThreads, sizeof(RunShared<T>), stream, numbers, count, room);
  launch(merge_runs_kernel<T>, blocks_for(count, kWarp), kMergeThreads, sizeof(MergeShared), stream, room, int(count), sorted, order);
}

// The walk by stretches of 2^bits tiles.
void plan_walk(TileArguments& a, int bits) {
  const int64_t down = blocks_for(a.row_tiles, kSquare), across = blocks_for(a.column_tiles, kSquare);
  a.beside_diagonal = a.self_form ? a.row_tiles - 1 : 0;
  a.stretch_bits = bits;
  a.stretches = a.beside_diagonal + ((a.self_form ? down * (down + 1) / 2 : down * across) << (2 * kSquareBits - bits));
}

// The longest stretches of which every one of so many blocks has some six: with fewer, some would have much more to do than others.
int stretch_bits(const TileArguments& a, int64_t blocks) {
  const int64_t tiles = a.self_form ? a.row_tiles * (a.row_tiles + 1) / 2 : a.row_tiles * a.column_tiles;
  int bits = 0;
  while (bits < kSquareBits && tiles >= 6 * blocks << (bits + 1)) ++bits;
  return bits;
}

template <class Operand>
void mine_packed(const Batch& batch, const TileMining& mining, void* stream) {
  TileArguments a;
  a.rows = mining.anchors;
  a.columns = mining.references;
  a.row_tiles = padded_rows(batch.anchors.count) / kTileRows;
  a.column_tiles = padded_rows(batch.references.count) / kTileRows;
  a.chunks = int(operand_row_bytes(batch.storage, batch.anchors.depth, mining.single_pass) / kChunkBytes);
  a.self_form = batch.self_form;
  a.row_keys = mining.anchor_keys;
  a.column_keys = mining.reference_keys;
  const auto run_kind = [&](auto deep) {
    constexpr bool kDeep = decltype(deep)::value;
    if (mining.by_wgmma) {
      int64_t at_once = multiprocessors() * kBlocksAtOnce<kDeep>;
      // Of squares with few rows, every other block of an even number of them would find none.
      if (!a.self_form && a.row_tiles < kSquare) at_once = (at_once - 1) | 1;
      plan_walk(a, a.chunks <= kWgmmaStages ? stretch_bits(a, at_once) : 0);
      launch(mine_wgmma_kernel<Operand, kDeep>, std::min(a.stretches, at_once), kTileThreads, sizeof(WgmmaShared), stream, a);
    } else {
      plan_walk(a, 0);
      for (int64_t first = 0; first < a.stretches; first += kMostBlocks) {
        const int64_t blocks = std::min(a.stretches - first, kMostBlocks);
        launch(mine_mma_kernel<Operand, kDeep>, blocks, kTileThreads, sizeof(MmaShared), stream, a, first);
      }
    }
  };
  if constexpr (Operand::kSplit) {
    if (batch.anchors.depth > kShallow) return run_kind(std::true_type{});
  }
  run_kind(std::false_type{});
}

}  // namespace

void row_norms(const Batch& batch, void* stream) {
  dispatch(batch.storage, [&](auto s) {
    norms_of<decltype(s)>(batch.anchors, batch.anchor_norm, batch.flags, stream);
    if (!batch.self_form) norms_of<decltype(s)>(batch.references, batch.reference_norm, batch.flags, stream);
  });
}

// Enough blocks to fill a large GPU twice, as long as every split has a tile to walk over.
int direct_splits(int64_t anchors, int64_t references) {
  constexpr int64_t kBlocks = 264, kMostSplits = 64;
  const int64_t row_tiles = std::max<int64_t>(1, blocks_for(anchors, kDirectTile));
  return int(std::clamp<int64_t>(kBlocks / row_tiles, 1, std::clamp<int64_t>(blocks_for(references, kDirectTile), 1, kMostSplits)));
}

void mine_direct(const Batch& batch, const DirectFound& found, void* stream) {
  dispatch(batch.storage, [&](auto s) {
    using S = decltype(s);
    const int64_t blocks = blocks_for(batch.anchors.count, kDirectTile) * found.splits;
    launch(mine_direct_kernel<S>, blocks, kDirectThreads, sizeof(DirectShared<Compute<S>>), stream, batch, found);
  });
}

int64_t operand_row_bytes(Storage storage, int64_t depth, bool single_pass) {
  const int64_t elements = storage == Storage::float32 && !single_pass ? kPieces * Split::kElements : kPieces * Plain<Half>::kElements;
  return blocks_for(depth, elements) * kChunkBytes;
}

bool can_use_wgmma() { return has_wgmma(mine_wgmma_kernel<Split, false>); }

int centre_slices(int64_t rows) { return int(std::clamp<int64_t>(rows / 256, 1, 64)); }

void find_centre(const Batch& batch, const Centre& centre, void* stream) {
  const int64_t depth = batch.anchors.depth;
  dispatch(batch.storage, [&](auto s) {
    using S = decltype(s);
    const auto sums = [&](const Rows& x, const double* norms, int set) {
      const int64_t blocks = blocks_for(depth, kCentreColumns) * centre.slices;
      launch(centre_sums_kernel<S>, blocks, kCentreThreads, kCentreThreads * sizeof(double), stream, x, norms, centre.slices,
             centre.sums + int64_t(set) * centre.slices * depth);
    };
    sums(batch.anchors, batch.anchor_norm, 0);
    if (!batch.self_form) sums(batch.references, batch.reference_norm, 1);
    launch(centre_kernel<S>, blocks_for(depth, kCentreThreads), kCentreThreads, kSpreadPairs * sizeof(double), stream, batch, centre);
  });
}

void sort_by_rank(const int64_t* numbers, int64_t count, Runs<int64_t> room, int64_t* sorted, int64_t* order, void* stream) {
  launch_sort(numbers, count, room, sorted, order, stream);
}

void sort_by_rank(const int32_t* numbers, int64_t count, Runs<int32_t> room, int32_t* sorted, int64_t* order, void* stream) {
  launch_sort(numbers, count, room, sorted, order, stream);
}

void pack_tiles(const Batch& batch, const TileMining& mining, void* stream) {
  if (mining.centre.sums) find_centre(batch, mining.centre, stream);
  with_operand(batch.storage, mining.single_pass, [&](auto s, auto operand) {
    pack<decltype(s), decltype(operand)>(batch, mining, true, stream);
    if (!batch.self_form) pack<decltype(s), decltype(operand)>(batch, mining, false, stream);
  });
}

void mine_tiles(const Batch& batch, const TileMining& mining, void* stream) {
  with_operand(batch.storage, mining.single_pass,
               [&](auto, auto operand) { mine_packed<decltype(operand)>(batch, mining, stream); });
}

int64_t loss_parts(int64_t anchors) { return std::max<int64_t>(1, blocks_for(anchors, kRowWarps)); }

void finish_direct(const Batch& batch, const DirectFound& found, const Triplets& out, const LossOptions& options, void* stream) {
  dispatch(batch.storage, [&](auto s) {
    using S = decltype(s);
    finish<S>(batch, DirectChoices<Compute<S>>{found, batch.anchors.count}, out, options, stream);
  });
}

void finish_tiles(const Batch& batch, const TileMining& mining, const Triplets& out, const LossOptions& options, void* stream) {
  dispatch(batch.storage, [&](auto s) {
    using S = decltype(s);
    if constexpr (!std::is_same_v<S, double>) {  // of which there are no tiles
      const int64_t blocks = blocks_for(batch.anchors.count, kChoosingAnchors);
      launch(choose_again_kernel<S>, blocks, kBlockThreads, sizeof(ChoosingShared), stream, batch, mining);
      finish<S>(batch, TileChoices{mining.anchor_keys, mining.anchors.original}, out, options, stream);
    }
  });
}

void extremes_of_direct(const Batch& batch, const DirectFound& found, const Extremes& out, void* stream) {
  dispatch(batch.storage, [&](auto s) {
    using T = Compute<decltype(s)>;
    write_extremes<T>(batch.anchors.count, DirectChoices<T>{found, batch.anchors.count}, nullptr, batch.flags, out, stream);
  });
}

void extremes_of_tiles(const Batch& batch, const TileMining& mining, bool of_references, const Extremes& out, void* stream) {
  const PackedSet& set = of_references ? mining.references : mining.anchors;
  const TileChoices choices{of_references ? mining.reference_keys : mining.anchor_keys, set.original};
  write_extremes<float>(of_references ? batch.references.count : batch.anchors.count, choices, set.half_norm, batch.flags, out, stream);
}

void lay_choices(const LossGradient& g, const LossOptions& options, void* stream) {
  const int64_t anchors = g.batch.anchors.count;
  if (anchors == 0) return;
  dispatch(g.batch.storage, [&](auto s) {
    launch(lay_choices_kernel<Compute<decltype(s)>>, blocks_for(anchors, 256), 256, 0, stream, g, options);
  });
}

void triplet_gradient(const LossGradient& g, const LossOptions& options, void* stream) {
  dispatch(g.batch.storage, [&](auto s) {
    using S = decltype(s);
    const int64_t anchors = g.batch.anchors.count, columns = blocks_for(g.batch.anchors.depth, kGradientColumns);
    launch(prepare_kernel<Compute<S>>, blocks_for(std::max(anchors, g.batch.references.count + 1), 256), 256, 0, stream, g, options);
    const auto run = [&](auto kernel, void* grad, int64_t rows) {
      if (rows == 0) return;
      launch(kernel, blocks_for(rows, kRowWarps) * columns, kRowThreads, sizeof(GradientShared), stream, g, grad, rows);
    };
    if (g.batch.self_form) {
      run(gradient_kernel<S, true, true>, g.grad, anchors);
    } else {
      run(gradient_kernel<S, true, false>, g.grad, anchors);
      if (g.grad_references) run(gradient_kernel<S, false, true>, g.grad_references, g.batch.references.count);
    }
  });
}

}  // namespace deepsim::cuda
