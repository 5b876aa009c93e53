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

}  // namespace

int64_t gram_tiles(int64_t channels) {
  const int64_t side = blocks_for(channels, kGramTile);
  return side * (side + 1) / 2;
}

// Enough blocks for two on each multiprocessor of a large GPU, but no slice so short that its sums cost as much as its products.
int gram_slices(int64_t batch, int64_t channels, int64_t positions) {
  constexpr int64_t kBlocks = 264, kShortest = 256;
  const int64_t wanted = blocks_for(kBlocks, batch * gram_tiles(channels));
  return int(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, positions / kShortest)));
}

int64_t gram_reduce_blocks(int64_t batch, int64_t channels) { return batch * gram_tiles(channels) * kReduceBlocksPerTile; }

void gram(Storage storage, bool tf32, const Features& f, const GramSpace& space, const GramResult& out, void* stream) {
  const int64_t tiles = gram_tiles(f.channels);
  dispatch_product<false>(storage, tf32, [&](auto element, auto product) {
    using S = decltype(element);
    using Product = decltype(product);
    launch(gram_tiles_kernel<S, Product>, f.batch * space.slices * tiles, kProductThreads, sizeof(ProductShared<Product>), stream, f,
           space.slices, tiles, space.sums);
    launch(gram_reduce_kernel<typename Product::T>, gram_reduce_blocks(f.batch, f.channels), kReduceThreads, sizeof(ReduceShared),
           stream, f.channels, tiles, space, out);
  });
}

void gram_gradient(Storage storage, bool tf32, const Features& f, const void* g, double scale, void* symmetric, const Features& grad,
                   void* stream) {
  const int64_t elements = f.batch * f.channels * f.channels;
  const int64_t channel_tiles = blocks_for(f.channels, kGramTile), position_tiles = blocks_for(f.positions, kGramTile);
  dispatch_product<true>(storage, tf32, [&](auto element, auto product) {
    using S = decltype(element);
    using Product = decltype(product);
    using T = typename Product::T;
    T* matrix = static_cast<T*>(symmetric);
    launch(symmetrise_kernel<T>, blocks_for(elements, 256), 256, 0, stream, static_cast<const T*>(g), f.channels, elements, scale,
           matrix);
    launch(gram_gradient_kernel<S, Product>, f.batch * channel_tiles * position_tiles, kProductThreads,
           sizeof(ProductShared<Product>), stream, f, matrix, grad, channel_tiles, position_tiles);
  });
}

}  // namespace deepsim::cuda
