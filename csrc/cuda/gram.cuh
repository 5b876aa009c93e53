// Gram matrices of features, the style loss of them, and their gradient, for all layers at once.
//
// Forward: a block adds up one tile on or above the diagonal over one slice of positions; then the slices are added up in order,
// each sum is written on both sides of the diagonal and taken into the loss. Backward: one product, M F with M = value(g) + value(g^T).
#pragma once

#include "tile_product.cuh"

namespace deepsim::cuda {

// Tile t is (row, column) with row <= column, column by column.
__device__ __forceinline__ void gram_tile(int64_t t, int64_t& row, int64_t& column) {
  column = 0;
  while ((column + 1) * (column + 2) / 2 <= t) ++column;  // a few dozen steps at most: C is in the hundreds
  row = t - column * (column + 1) / 2;
}

template <class S>
__device__ __forceinline__ const S* sample(const Features& f, int64_t b) {
  return static_cast<const S*>(f.data) + b * f.batch_stride;
}

// The layer whose blocks, from that number on, include this one.
template <class Layer>
__device__ __forceinline__ int layer_of(const Layer* layers, int count, int64_t Layer::*first) {
  int i = 0;
  while (i + 1 < count && layers[i + 1].*first <= int64_t(blockIdx.x)) ++i;
  return i;
}

template <class S, class Product>
__global__ void __launch_bounds__(kProductThreads, 2) gram_tiles_kernel(const __grid_constant__ Gram work) {
  using T = typename Product::T;
  auto& shared = shared_memory<ProductShared<Product>>();
  const GramLayer& layer = work.layer[layer_of(work.layer, work.count, &GramLayer::first_sum)];
  const Features& f = layer.features;
  const int64_t tiles = layer.tiles, slices = layer.slices, block = blockIdx.x - layer.first_sum;
  const int64_t t = block % tiles, slice = block / tiles % slices, b = block / tiles / slices;
  int64_t row, column;
  gram_tile(t, row, column);
  // Slices begin where loads of several elements do.
  const int64_t length = ((f.positions + slices - 1) / slices + Product::kDepth - 1) / Product::kDepth * Product::kDepth;
  const int64_t begin = slice * length < f.positions ? slice * length : f.positions;
  const int64_t end = begin + length < f.positions ? begin + length : f.positions;
  const Matrix<S> m{sample<S>(f, b), f.channels, f.positions, f.channel_stride, f.position_stride};
  Product product;
  if (begin < end) multiply(product, shared, m, row * kGramTile, m, column * kGramTile, row == column, begin, end);
  T* to = static_cast<T*>(work.sums) + int64_t(blockIdx.x) * (kGramTile * kGramTile);
  product.for_each([&](int r, int c, T sum) { to[r * kGramTile + c] = sum; });
}

// Blocks of 32 elements of one row of a tile by 8 groups, each of which adds up every eighth slice.
constexpr int kReduceElements = 32, kReduceGroups = 8;
constexpr int kReduceThreads = kReduceElements * kReduceGroups;
constexpr int kReduceBlocksPerTile = kGramTile * kGramTile / kReduceElements;

struct ReduceShared {
  double sum[kReduceGroups][kReduceElements];
  bool last;
};

template <class T>
__global__ void __launch_bounds__(kReduceThreads) gram_reduce_kernel(const __grid_constant__ Gram work) {
  auto& shared = shared_memory<ReduceShared>();
  const GramLayer& layer = work.layer[layer_of(work.layer, work.count, &GramLayer::first_reduce)];
  const int64_t channels = layer.features.channels, tiles = layer.tiles, slices = layer.slices;
  const int64_t block = blockIdx.x - layer.first_reduce, t = block / kReduceBlocksPerTile % tiles, b = block / kReduceBlocksPerTile / tiles;
  const int element = int(block % kReduceBlocksPerTile) * kReduceElements + int(threadIdx.x) % kReduceElements;
  const int group = int(threadIdx.x) / kReduceElements, lane = lane_index();
  const T* sums =
      static_cast<const T*>(work.sums) + (layer.first_sum + b * slices * tiles + t) * (kGramTile * kGramTile) + element;
  double sum = 0;
  for (int64_t s = group; s < slices; s += kReduceGroups) sum += double(sums[s * tiles * (kGramTile * kGramTile)]);
  shared.sum[group][lane] = sum;
  __syncthreads();
  if (group == 0) {
    for (int g = 1; g < kReduceGroups; ++g) sum += shared.sum[g][lane];
    int64_t row, column;
    gram_tile(t, row, column);
    const int64_t i = row * kGramTile + element / kGramTile, j = column * kGramTile + element % kGramTile;
    double loss = 0;
    if (i < channels && j < channels && i <= j) {  // the lower half of a tile on the diagonal says the same again
      const auto write = [&](int64_t r, int64_t c) {
        const int64_t at = r * channels + c;
        T v = T(rounded_product(layer.scale, sum));
        if (layer.target) v -= static_cast<const T*>(layer.target)[b * layer.target_stride + at];
        static_cast<T*>(layer.matrix)[b * channels * channels + at] = v;
        loss += work.distance == StyleDistance::l1 ? std::fabs(double(v)) : double(v) * double(v);
      };
      write(i, j);
      if (i != j) write(j, i);
    }
    loss = warp_sum(loss);
    if (work.loss && lane == 0) work.partial_losses[blockIdx.x] = loss;
  }
  if (!work.loss) return;

  __threadfence();  // what this block wrote is seen by whoever sees its ticket
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(work.finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  double total = 0;
  for (int l = 0; l < work.count; ++l) {
    const int64_t end = l + 1 < work.count ? work.layer[l + 1].first_reduce : int64_t(gridDim.x);
    sum = 0;
    for (int64_t k = work.layer[l].first_reduce + threadIdx.x; k < end; k += kReduceThreads) sum += work.partial_losses[k];
    shared.sum[group][lane] = sum;
    __syncthreads();
    if (group == 0) {
      for (int g = 1; g < kReduceGroups; ++g) sum += shared.sum[g][lane];
      sum = work.layer[l].factor * warp_sum(sum);
      if (work.distance == StyleDistance::frobenius) sum = std::sqrt(sum);
      if (lane == 0) static_cast<T*>(work.losses)[l] = T(sum);
      total += work.layer[l].weight * sum;
    }
    __syncthreads();  // read before the next layer's sums take their place
  }
  if (threadIdx.x == 0) *static_cast<T*>(work.loss) = T(total);
}

constexpr int kSymmetriseThreads = 256;

// m = value(g) + value(g^T) for every sample; numbers of one thread per element.
template <class T>
__global__ void __launch_bounds__(kSymmetriseThreads) symmetrise_kernel(const __grid_constant__ GramGradient work) {
  const GramGradientLayer& layer = work.layer[layer_of(work.layer, work.count, &GramGradientLayer::first_symmetrise)];
  const int64_t channels = layer.features.channels, square = channels * channels;
  const int64_t i = (blockIdx.x - layer.first_symmetrise) * kSymmetriseThreads + threadIdx.x;
  if (i >= layer.features.batch * square) return;
  double scale = layer.scale;
  if (work.grad_loss) scale *= double(*static_cast<const T*>(work.grad_loss));
  if (work.distance == StyleDistance::frobenius) {
    const double loss = double(*static_cast<const T*>(layer.loss));
    scale = loss == 0 ? 0 : scale / loss;
  }
  const auto value = [&](double x) {
    if (work.distance != StyleDistance::l1) return x;
    return x > 0 ? 1.0 : x < 0 ? -1.0 : x;
  };
  const T* g = static_cast<const T*>(layer.g);
  const int64_t b = i / square, row = i % square / channels, column = i % channels;
  static_cast<T*>(layer.symmetric)[i] = T(scale * (value(double(g[i])) + value(double(g[b * square + column * channels + row]))));
}

// One tile of M F. Where positions are adjacent in memory its rows are channels, otherwise positions: so results that neighbours
// hold are written side by side.
template <class S, class Product>
__global__ void __launch_bounds__(kProductThreads, 2) gram_gradient_kernel(const __grid_constant__ GramGradient work) {
  using T = typename Product::T;
  auto& shared = shared_memory<ProductShared<Product>>();
  const GramGradientLayer& layer = work.layer[layer_of(work.layer, work.count, &GramGradientLayer::first_product)];
  const Features &f = layer.features, &grad = layer.grad;
  const T* matrix = static_cast<const T*>(layer.symmetric);
  // Blocks that read the same positions follow each other.
  const int64_t block = blockIdx.x - layer.first_product, channel = block % layer.channel_tiles * kGramTile;
  const int64_t position = block / layer.channel_tiles % layer.position_tiles * kGramTile;
  const int64_t b = block / layer.channel_tiles / layer.position_tiles;
  const Matrix<T> m{matrix + b * f.channels * f.channels, f.channels, f.channels, f.channels, 1};
  const Matrix<S> x{sample<S>(f, b), f.positions, f.channels, f.position_stride, f.channel_stride};
  S* to = const_cast<S*>(sample<S>(grad, b));
  Product product;
  multiply(product, shared, m, channel, x, position, false, 0, f.channels);
  product.for_each([&](int r, int c, T v) {
    if (channel + r < f.channels && position + c < f.positions) {
      narrow(v, to[(channel + r) * grad.channel_stride + (position + c) * grad.position_stride]);
    }
  });
}

}  // namespace deepsim::cuda
