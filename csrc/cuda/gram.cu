// Gram matrix and style loss on CUDA: which kernels run, in which order, on how many blocks.
#include "gram.h"

#include <algorithm>

#include "dispatch.cuh"
#include "gram.cuh"

namespace deepsim::cuda {
namespace {

// Calls f(element, product) with the product that suits the storage. `kSplit...`: whether a float32 operand on that side, or the
// float32 matrix of the gradient, needs its small part.
template <bool kMatrixOnTheLeft, class F>
void dispatch_product(Storage storage, bool tf32, F f) {
  switch (storage) {
    case Storage::float64: return f(double{}, PlainProduct{});
    case Storage::float32: return tf32 ? f(float{}, TensorProduct<false, false>{}) : f(float{}, TensorProduct<true, true>{});
    case Storage::bfloat16: return f(BFloat16{}, TensorProduct<kMatrixOnTheLeft, false>{});
    case Storage::float16: return f(Half{}, TensorProduct<kMatrixOnTheLeft, false>{});
  }
}

int64_t gram_tiles(int64_t channels) {
  const int64_t side = blocks_for(channels, kGramTile);
  return side * (side + 1) / 2;
}

// Enough blocks for two on each multiprocessor of a large GPU, but no slice so short that its sums cost as much as its products.
int64_t gram_slices(int64_t batch, int64_t tiles, int64_t positions) {
  constexpr int64_t kBlocks = 264, kShortest = 256;
  return std::clamp<int64_t>(blocks_for(kBlocks, batch * tiles), 1, std::max<int64_t>(1, positions / kShortest));
}

}  // namespace

void plan_gram(Gram& work) {
  work.sum_blocks = work.reduce_blocks = 0;
  for (int i = 0; i < work.count; ++i) {
    GramLayer& layer = work.layer[i];
    layer.tiles = gram_tiles(layer.features.channels);
    layer.slices = gram_slices(layer.features.batch, layer.tiles, layer.features.positions);
    layer.first_sum = work.sum_blocks;
    layer.first_reduce = work.reduce_blocks;
    work.sum_blocks += layer.features.batch * layer.slices * layer.tiles;
    work.reduce_blocks += layer.features.batch * layer.tiles * kReduceBlocksPerTile;
  }
}

void gram(Storage storage, bool tf32, const Gram& work, void* stream) {
  dispatch_product<false>(storage, tf32, [&](auto element, auto product) {
    using S = decltype(element);
    using Product = decltype(product);
    launch(gram_tiles_kernel<S, Product>, work.sum_blocks, kProductThreads, sizeof(ProductShared<Product>), stream, work);
    launch(gram_reduce_kernel<typename Product::T>, work.reduce_blocks, kReduceThreads, sizeof(ReduceShared), stream, work);
  });
}

void gram_gradient(Storage storage, bool tf32, GramGradient work, void* stream) {
  int64_t symmetrise_blocks = 0, product_blocks = 0;
  for (int i = 0; i < work.count; ++i) {
    GramGradientLayer& layer = work.layer[i];
    const Features& f = layer.features;
    layer.channel_tiles = blocks_for(f.channels, kGramTile);
    layer.position_tiles = blocks_for(f.positions, kGramTile);
    layer.first_symmetrise = symmetrise_blocks;
    layer.first_product = product_blocks;
    symmetrise_blocks += blocks_for(f.batch * f.channels * f.channels, kSymmetriseThreads);
    product_blocks += f.batch * layer.channel_tiles * layer.position_tiles;
  }
  dispatch_product<true>(storage, tf32, [&](auto element, auto product) {
    using S = decltype(element);
    using Product = decltype(product);
    launch(symmetrise_kernel<typename Product::T>, symmetrise_blocks, kSymmetriseThreads, 0, stream, work);
    launch(gram_gradient_kernel<S, Product>, product_blocks, kProductThreads, sizeof(ProductShared<Product>), stream, work);
  });
}

}  // namespace deepsim::cuda
