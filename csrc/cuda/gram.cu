// Gram matrix and style loss on CUDA: which kernels run, in which order, on how many blocks.
#include "gram.h"

#include <algorithm>

#include "dispatch.cuh"
#include "gram.cuh"

namespace deepsim::cuda {
namespace {

// Positions across a tile of the gradient.
constexpr int kGradientPositions = 128;

// Calls f with the product that suits the storage, of kColumns columns where tensor cores do it. kOfSums: whether 16-bit numbers meet a
// float32 matrix on the left.
template <int kColumns, bool kOfSums, class F>
void dispatch_product(Storage storage, bool tf32, F f) {
  constexpr int kLefts = kOfSums ? 2 : 1;
  switch (storage) {
    case Storage::float64: return f(PlainProduct{});
    case Storage::float32:
      return tf32 ? f(TensorProduct<float, kColumns, 1, false>{}) : f(TensorProduct<float, kColumns, 1, true>{});
    case Storage::bfloat16: return f(TensorProduct<BFloat16, kColumns, kLefts, false>{});
    case Storage::float16: return f(TensorProduct<Half, kColumns, kLefts, false>{});
  }
}

int64_t gram_tiles(int64_t channels) {
  const int64_t side = blocks_for(channels, kGramTile);
  return side * (side + 1) / 2;
}

// Enough blocks for three on each multiprocessor of a large GPU, but no slice so short that its sums (16 KiB, written and read) come
// near what it reads itself (two times 64 rows of 128 bytes a chunk).
int64_t gram_slices(int64_t batch, int64_t tiles, int64_t positions, int64_t element_size) {
  constexpr int64_t kBlocks = 396, kFewestChunks = 16;
  return std::clamp<int64_t>(blocks_for(kBlocks, batch * tiles), 1, std::max<int64_t>(1, positions * element_size / (128 * kFewestChunks)));
}

}  // namespace

void plan_gram(Storage storage, Gram& work) {
  int64_t element_size = 0;
  dispatch(storage, [&](auto element) { element_size = sizeof element; });
  work.sum_blocks = work.reduce_blocks = 0;
  for (int i = 0; i < work.count; ++i) {
    GramLayer& layer = work.layer[i];
    layer.tiles = gram_tiles(layer.features.channels);
    layer.slices = gram_slices(layer.features.batch, layer.tiles, layer.features.positions, element_size);
    layer.first_sum = work.sum_blocks;
    layer.first_reduce = work.reduce_blocks;
    work.sum_blocks += layer.features.batch * layer.slices * layer.tiles;
    work.reduce_blocks += layer.features.batch * layer.tiles * kReduceBlocksPerTile;
  }
}

void gram(Storage storage, bool tf32, const Gram& work, void* stream) {
  dispatch_product<kGramTile, false>(storage, tf32, [&](auto product) {
    using Product = decltype(product);
    launch(gram_tiles_kernel<Product>, work.sum_blocks, Product::kThreads, sizeof(TilesShared<Product>), stream, work);
    launch(gram_reduce_kernel<typename Product::T>, work.reduce_blocks, kReduceThreads, sizeof(ReduceShared), stream, work);
  });
}

void gram_gradient(Storage storage, bool tf32, GramGradient work, void* stream) {
  dispatch_product<kGradientPositions, true>(storage, tf32, [&](auto product) {
    using Product = decltype(product);
    int64_t symmetrise_blocks = 0, product_blocks = 0;
    for (int i = 0; i < work.count; ++i) {
      GramGradientLayer& layer = work.layer[i];
      const Features& f = layer.features;
      layer.channel_tiles = blocks_for(f.channels, kGramTile);
      layer.position_tiles = blocks_for(f.positions, Product::kColumns);
      layer.first_symmetrise = symmetrise_blocks;
      layer.first_product = product_blocks;
      symmetrise_blocks += f.batch * f.channels;
      product_blocks += f.batch * layer.channel_tiles * layer.position_tiles;
    }
    launch(symmetrise_kernel<typename Product::Storage>, symmetrise_blocks, kSymmetriseThreads, sizeof(uint32_t), stream, work);
    launch(gram_gradient_kernel<Product>, product_blocks, Product::kThreads, sizeof(GradientTileShared<Product>), stream, work);
  });
}

}  // namespace deepsim::cuda
