// Gram matrices of features, the style loss of them, and their gradient, for all layers at once.
//
// Forward: a block adds up one tile on or above the diagonal over one slice of positions; then the slices are added up in order,
// each sum is written on both sides of the diagonal and taken into the loss. Backward: one product, m F with m = value(g) + value(g^T).
#pragma once

#include "tile_product.cuh"

namespace deepsim::cuda {

// Neighbours in memory, read or written together.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Several {
  T element[kCount];
};

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

// One chunk is multiplied while three are on their way; three blocks fit on an H200's multiprocessor.
constexpr int kTileStages = 4;

template <class Product>
struct TilesShared {
  ProductStage<Product> stage[kTileStages];
};

template <class Product>
__global__ void __launch_bounds__(Product::kThreads, 3) gram_tiles_kernel(const __grid_constant__ Gram work) {
  using S = typename Product::Storage;
  using T = typename Product::T;
  auto& shared = shared_memory<TilesShared<Product>>();
  const GramLayer& layer = work.layer[layer_of(work.layer, work.count, &GramLayer::first_sum)];
  const Features& f = layer.features;
  const int64_t tiles = layer.tiles, slices = layer.slices, block = blockIdx.x - layer.first_sum;
  const int64_t t = block % tiles, slice = block / tiles % slices, b = block / tiles / slices;
  int64_t row, column;
  gram_tile(t, row, column);
  // Slices begin where whole chunks do.
  constexpr int kDepth = Operand<S, kGramTile>::kDepth;
  const int64_t length = ((f.positions + slices - 1) / slices + kDepth - 1) / kDepth * kDepth;
  const int64_t begin = slice * length < f.positions ? slice * length : f.positions;
  const int64_t end = begin + length < f.positions ? begin + length : f.positions;
  const Matrix<S> m[1] = {{sample<S>(f, b), f.channels, f.positions, f.channel_stride, f.position_stride}};
  Product product;
  if (f.position_stride == 1) {
    multiply<false, false>(product, shared.stage, m, row * kGramTile, m[0], column * kGramTile, row == column, begin, end);
  } else {
    multiply<true, true>(product, shared.stage, m, row * kGramTile, m[0], column * kGramTile, row == column, begin, end);
  }
  T* to = static_cast<T*>(work.sums) + int64_t(blockIdx.x) * (kGramTile * kGramTile);
  product.for_each_pair([&](int r, int c, T first, T second) {
    const Several<T, 2> pair = {{first, second}};
    reinterpret_cast<Several<T, 2>*>(to)[(r * kGramTile + c) / 2] = pair;
  });
}

// Blocks of two rows of a tile by 8 groups, each of which adds up every eighth slice; threads take four neighbours.
constexpr int kReduceNeighbours = 4, kReduceGroups = 8, kReduceElements = kWarp * kReduceNeighbours;
constexpr int kReduceThreads = kWarp * kReduceGroups;
constexpr int kReduceBlocksPerTile = kGramTile * kGramTile / kReduceElements;

struct ReduceShared {
  double sum[kReduceGroups][kWarp][kReduceNeighbours];
  bool last;
};

template <class T>
__global__ void __launch_bounds__(kReduceThreads) gram_reduce_kernel(const __grid_constant__ Gram work) {
  auto& shared = shared_memory<ReduceShared>();
  const GramLayer& layer = work.layer[layer_of(work.layer, work.count, &GramLayer::first_reduce)];
  const int64_t channels = layer.features.channels, tiles = layer.tiles, slices = layer.slices;
  const int64_t block = blockIdx.x - layer.first_reduce, t = block / kReduceBlocksPerTile % tiles, b = block / kReduceBlocksPerTile / tiles;
  const int group = int(threadIdx.x) / kWarp, lane = lane_index();
  const int element = int(block % kReduceBlocksPerTile) * kReduceElements + lane * kReduceNeighbours;
  using Neighbours = Several<T, kReduceNeighbours>;
  const T* sums = static_cast<const T*>(work.sums) + (layer.first_sum + b * slices * tiles + t) * (kGramTile * kGramTile) + element;
  double sum[kReduceNeighbours] = {};
#pragma unroll 4  // as many loads on their way
  for (int64_t s = group; s < slices; s += kReduceGroups) {
    const Neighbours part = *reinterpret_cast<const Neighbours*>(sums + s * tiles * (kGramTile * kGramTile));
    for (int e = 0; e < kReduceNeighbours; ++e) sum[e] += double(part.element[e]);
  }
  for (int e = 0; e < kReduceNeighbours; ++e) shared.sum[group][lane][e] = sum[e];
  __syncthreads();
  if (group == 0) {
    int64_t row, column;
    gram_tile(t, row, column);
    const int64_t i = row * kGramTile + element / kGramTile;
    double loss = 0;
    for (int e = 0; e < kReduceNeighbours; ++e) {
      const int64_t j = column * kGramTile + element % kGramTile + e;
      if (i >= channels || j >= channels || i > j) continue;  // the lower half of a tile on the diagonal says the same again
      double whole = sum[e];
      for (int g = 1; g < kReduceGroups; ++g) whole += shared.sum[g][lane][e];
      const auto write = [&](int64_t r, int64_t c) {
        const int64_t at = r * channels + c;
        T v = T(rounded_product(layer.scale, whole));
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
    double part = 0;
    for (int64_t k = work.layer[l].first_reduce + threadIdx.x; k < end; k += kReduceThreads) part += work.partial_losses[k];
    shared.sum[group][lane][0] = part;
    __syncthreads();
    if (group == 0) {
      for (int g = 1; g < kReduceGroups; ++g) part += shared.sum[g][lane][0];
      part = work.layer[l].factor * warp_sum(part);
      if (work.distance == StyleDistance::frobenius) part = std::sqrt(part);
      if (lane == 0) static_cast<T*>(work.losses)[l] = T(part);
      total += work.layer[l].weight * part;
    }
    __syncthreads();  // read before the next layer's sums take their place
  }
  if (threadIdx.x == 0) *static_cast<T*>(work.loss) = T(total);
}

constexpr int kSymmetriseThreads = 128;

// The m = value(g) + value(g^T) of one sample. For 16-bit features it is the sum of two matrices in their format, big and small,
// which keeps 22 bits of it in float16 and 16 in bfloat16. Every row is multiplied by a power of two that brings its largest element near
// the largest that float16 holds; row_scale takes that back.
template <class S>
struct Symmetric {
  S *big, *small;
  float* row_scale;

  __device__ __forceinline__ Symmetric(const GramGradientLayer& layer, int64_t b) {
    const int64_t channels = layer.features.channels, square = channels * channels;
    big = static_cast<S*>(layer.symmetric) + b * square;
    small = big + layer.features.batch * square;
    row_scale = layer.row_scale + b * channels;
  }
};

// One row of m by each block.
template <class S>
__global__ void __launch_bounds__(kSymmetriseThreads) symmetrise_kernel(const __grid_constant__ GramGradient work) {
  using T = Compute<S>;
  const GramGradientLayer& layer = work.layer[layer_of(work.layer, work.count, &GramGradientLayer::first_symmetrise)];
  const int64_t channels = layer.features.channels, block = blockIdx.x - layer.first_symmetrise;
  const int64_t b = block / channels, row = block % channels;
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
  const T* g = static_cast<const T*>(layer.g) + b * channels * channels;
  const auto m = [&](int64_t column) {
    return scale * (value(double(g[row * channels + column])) + value(double(g[column * channels + row])));
  };
  const Symmetric<S> to(layer, b);
  if constexpr (sizeof(S) > 2) {
    for (int64_t c = threadIdx.x; c < channels; c += kSymmetriseThreads) to.big[row * channels + c] = T(m(c));
  } else {
    auto& largest = shared_memory<uint32_t>();  // the bits of the largest size in the row, or of NaN: larger than any
    if (threadIdx.x == 0) largest = 0;
    __syncthreads();
    uint32_t bits = 0;
    for (int64_t c = threadIdx.x; c < channels; c += kSymmetriseThreads) {
      const uint32_t size = __float_as_uint(std::fabs(float(m(c))));
      bits = size > bits ? size : bits;
    }
    atomicMax(&largest, bits);
    __syncthreads();
    constexpr int kLargest = 13;  // float16 goes from 2^-24 to 2^16
    const int exponent = int(largest >> 23) - 127;
    const int shift = exponent == 128 ? 0 : kLargest - exponent;  // nothing helps what is not finite
    const double factor = scalbn(1.0, shift);
    for (int64_t c = threadIdx.x; c < channels; c += kSymmetriseThreads) {
      const float v = float(factor * m(c));
      S big, small;
      narrow(v, big);
      narrow(v - widen(big), small);
      to.big[row * channels + c] = big;
      to.small[row * channels + c] = small;
    }
    if (threadIdx.x == 0) to.row_scale[row] = float(scalbn(1.0, -shift));
  }
}

// One chunk is multiplied while one is on its way: with one block beside it that is as much as memory needs.
constexpr int kGradientStages = 2;

// The stages, and then the results on their way out, as the gradient lies in memory: a line holds positions of a channel or channels
// of a position.
template <class Product>
union GradientTileShared {
  using S = typename Product::Storage;
  ProductStage<Product> stage[kGradientStages];
  Lines<S, kGramTile, Product::kColumns, 16> channel;
  Lines<S, Product::kColumns, kGramTile, 16> position;
};

// What a block works on. Blocks that read the same positions follow each other.
struct GradientTile {
  int64_t channel, position, b;

  __device__ __forceinline__ GradientTile(const GramGradientLayer& layer, int block, int positions) {
    channel = block % layer.channel_tiles * kGramTile;
    position = block / layer.channel_tiles % layer.position_tiles * positions;
    b = block / layer.channel_tiles / layer.position_tiles;
  }
};

// One tile of m F: channels down, positions across.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, 2) gram_gradient_kernel(const __grid_constant__ GramGradient work) {
  using S = typename Product::Storage;
  using T = typename Product::T;
  constexpr bool kIsSum = Product::kLefts == 2;
  auto& shared = shared_memory<GradientTileShared<Product>>();
  const GramGradientLayer& layer = work.layer[layer_of(work.layer, work.count, &GramGradientLayer::first_product)];
  const Features &f = layer.features, &grad = layer.grad;
  int block = int(blockIdx.x - layer.first_product);
  Product product;
  {
    const GradientTile tile(layer, block, Product::kColumns);
    const Symmetric<S> symmetric(layer, tile.b);
    Matrix<S> m[Product::kLefts];
    m[0] = {symmetric.big, f.channels, f.channels, f.channels, 1};
    if constexpr (kIsSum) m[1] = {symmetric.small, f.channels, f.channels, f.channels, 1};
    const Matrix<S> x{sample<S>(f, tile.b), f.positions, f.channels, f.position_stride, f.channel_stride};
    if (f.position_stride == 1) {
      multiply<false, true>(product, shared.stage, m, tile.channel, x, tile.position, false, 0, f.channels);
    } else {
      multiply<false, false>(product, shared.stage, m, tile.channel, x, tile.position, false, 0, f.channels);
    }
  }
  ptx::forget(block);  // or what is needed of it now would have taken registers from the product
  const GradientTile tile(layer, block, Product::kColumns);
  const int64_t channel = tile.channel, position = tile.position;
  const Symmetric<S> symmetric(layer, tile.b);
  __syncthreads();  // all are through with the stages
  const bool along = grad.position_stride == 1;
  product.for_each_pair([&](int r, int c, T first, T second) {
    if constexpr (kIsSum) {
      const float scale = channel + r < f.channels ? symmetric.row_scale[channel + r] : 0;
      first *= scale;
      second *= scale;
    }
    Several<S, 2> pair;
    narrow(first, pair.element[0]);
    narrow(second, pair.element[1]);
    if (along) {
      *reinterpret_cast<Several<S, 2>*>(shared.channel.at(r, c)) = pair;
    } else {
      *shared.position.at(c, r) = pair.element[0];
      *shared.position.at(c + 1, r) = pair.element[1];
    }
  });
  __syncthreads();
  S* to = const_cast<S*>(sample<S>(grad, tile.b)) + channel * grad.channel_stride + position * grad.position_stride;
  if (along) {
    shared.channel.template store<Product::kThreads>(to, grad.channel_stride, f.channels - channel, f.positions - position);
  } else {
    shared.position.template store<Product::kThreads>(to, grad.position_stride, f.positions - position, f.channels - channel);
  }
}

}  // namespace deepsim::cuda
