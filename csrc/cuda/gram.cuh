// Gram matrices of features, the style loss of them, and their gradient.
//
// Forward: a block adds up one tile on or above the diagonal over one slice of positions; then the slices are added up in order,
// each sum is written on both sides of the diagonal and taken into the loss. Backward: one product, M F with M = scale (g + g^T).
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

template <class S, class Product>
__global__ void __launch_bounds__(kProductThreads, 2) gram_tiles_kernel(Features f, int slices, int64_t tiles, void* sums) {
  using T = typename Product::T;
  auto& shared = shared_memory<ProductShared<Product>>();
  const int64_t t = blockIdx.x % tiles, slice = blockIdx.x / tiles % slices, b = blockIdx.x / tiles / slices;
  int64_t row, column;
  gram_tile(t, row, column);
  // Slices begin where loads of several elements do.
  const int64_t length = ((f.positions + slices - 1) / slices + Product::kDepth - 1) / Product::kDepth * Product::kDepth;
  const int64_t begin = slice * length < f.positions ? slice * length : f.positions;
  const int64_t end = begin + length < f.positions ? begin + length : f.positions;
  const Matrix<S> m{sample<S>(f, b), f.channels, f.positions, f.channel_stride, f.position_stride};
  Product product;
  if (begin < end) multiply(product, shared, m, row * kGramTile, m, column * kGramTile, row == column, begin, end);
  T* to = static_cast<T*>(sums) + int64_t(blockIdx.x) * (kGramTile * kGramTile);
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
__global__ void __launch_bounds__(kReduceThreads) gram_reduce_kernel(int64_t channels, int64_t tiles, GramSpace space, GramResult out) {
  auto& shared = shared_memory<ReduceShared>();
  const int64_t block = blockIdx.x, t = block / kReduceBlocksPerTile % tiles, b = block / kReduceBlocksPerTile / tiles;
  const int element = int(block % kReduceBlocksPerTile) * kReduceElements + int(threadIdx.x) % kReduceElements;
  const int group = int(threadIdx.x) / kReduceElements, lane = lane_index();
  const T* sums = static_cast<const T*>(space.sums) + (b * space.slices * tiles + t) * (kGramTile * kGramTile) + element;
  double sum = 0;
  for (int s = group; s < space.slices; s += kReduceGroups) sum += double(sums[s * tiles * (kGramTile * kGramTile)]);
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
        T v = T(rounded_product(out.scale, sum));
        if (out.target) v -= static_cast<const T*>(out.target)[b * out.target_stride + at];
        static_cast<T*>(out.matrix)[b * channels * channels + at] = v;
        loss += out.squared ? double(v) * double(v) : std::fabs(double(v));
      };
      write(i, j);
      if (i != j) write(j, i);
    }
    loss = warp_sum(loss);
    if (out.loss && lane == 0) space.losses[block] = loss;
  }
  if (!out.loss) return;

  __threadfence();  // what this block wrote is seen by whoever sees its ticket
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(space.finished, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  sum = 0;
  for (int64_t k = threadIdx.x; k < gridDim.x; k += kReduceThreads) sum += space.losses[k];
  shared.sum[group][lane] = sum;
  __syncthreads();
  if (group != 0) return;
  for (int g = 1; g < kReduceGroups; ++g) sum += shared.sum[g][lane];
  sum = warp_sum(sum);
  if (lane == 0) *static_cast<T*>(out.loss) = T(out.factor * sum);
}

// m = scale * (g + g^T) for every sample; numbers of one thread per element.
template <class T>
__global__ void symmetrise_kernel(const T* g, int64_t channels, int64_t elements, double scale, T* m) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  const int64_t square = channels * channels, b = i / square, row = i % square / channels, column = i % channels;
  m[i] = T(scale * (double(g[i]) + double(g[b * square + column * channels + row])));
}

// One tile of M F. Where positions are adjacent in memory its rows are channels, otherwise positions: so results that neighbours
// hold are written side by side.
template <class S, class Product>
__global__ void __launch_bounds__(kProductThreads, 2)
    gram_gradient_kernel(Features f, const typename Product::T* matrix, Features grad, int64_t channel_tiles, int64_t position_tiles) {
  using T = typename Product::T;
  auto& shared = shared_memory<ProductShared<Product>>();
  // Blocks that read the same positions follow each other.
  const int64_t channel = blockIdx.x % channel_tiles * kGramTile, position = blockIdx.x / channel_tiles % position_tiles * kGramTile;
  const int64_t b = blockIdx.x / channel_tiles / position_tiles;
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
