// Batch-hard mining by direct differences: every pair's |a - b|^2 in registers, every anchor's best so far beside it.
//
// Exact in every dtype and without any preparation: for float64, which tensor cores would not help, and for batches so small
// that packing would cost more than it gains. A block holds kDirectTile anchors and walks over its share of the references.
#pragma once

#include "rows.cuh"

namespace deepsim::cuda {

constexpr int kDirectTile = 64;                        // anchors, and references at a time
constexpr int kDirectPerThread = 4;                    // of each, so 16 x 16 threads
constexpr int kDirectSide = kDirectTile / kDirectPerThread;
constexpr int kDirectThreads = kDirectSide * kDirectSide;
constexpr int kDirectDepth = 16;                       // elements of a row at a time

template <class T>
struct DirectShared {
  // Four more than the tile: rows that are stored down a column fall into different banks, and stay 16-byte aligned.
  T anchors[kDirectDepth][kDirectTile + 4], references[kDirectDepth][kDirectTile + 4];
  int64_t labels[kDirectTile];  // of the references
  bool zero_anchor[kDirectTile], zero_reference[kDirectTile];
};

// The better of two candidates: by value, then the lower index.
template <class T, bool kLargest>
struct Best {
  T value = kLargest ? -infinity<T>() : infinity<T>();
  int32_t index = kNobody;

  __device__ __forceinline__ void improve(T v, int32_t i) {
    const bool better = kLargest ? v > value : v < value;
    if (better || (v == value && i < index)) {
      value = v;
      index = i;
    }
  }
};

// Columns [k0, k0 + kDirectDepth) of a tile's rows, zero beyond the matrix. Cosine distances are those of normalised rows.
template <class S, class T>
__device__ __forceinline__ void load_direct(const Rows& x, const double* norms, int64_t first, int64_t k0,
                                            T (&to)[kDirectDepth][kDirectTile + 4]) {
  constexpr int kRun = kDirectTile * kDirectDepth / kDirectThreads;  // adjacent elements that a thread loads
  const int row = int(threadIdx.x) / (kDirectDepth / kRun), k = int(threadIdx.x) % (kDirectDepth / kRun) * kRun;
  const bool inside = first + row < x.count;
  const S* from = row_of<S>(x, inside ? first + row : 0);
  const double norm = norms && inside ? norms[first + row] : 1.0;
  for (int e = 0; e < kRun; ++e) {
    const T v = inside && k0 + k + e < x.depth ? T(widen(from[k0 + k + e])) : T(0);
    // Divided, not multiplied by the inverse: so rows of one column become exactly 1 and -1.
    to[k + e][row] = !norms ? v : norm == 0 ? T(0) : T(double(v) / norm);
  }
}

template <class S>
__global__ void __launch_bounds__(kDirectThreads, 2) mine_direct_kernel(Batch batch, DirectFound found) {
  using T = Compute<S>;
  auto& shared = shared_memory<DirectShared<T>>();
  const int64_t anchors = batch.anchors.count, references = batch.references.count, depth = batch.anchors.depth;
  const int64_t row_tiles = (anchors + kDirectTile - 1) / kDirectTile, column_tiles = (references + kDirectTile - 1) / kDirectTile;
  const int64_t first_row = blockIdx.x % row_tiles * kDirectTile;
  const int split = int(blockIdx.x / row_tiles);
  const int row = int(threadIdx.x) / kDirectSide * kDirectPerThread, column = int(threadIdx.x) % kDirectSide * kDirectPerThread;

  Best<T, true> positive[kDirectPerThread];
  Best<T, false> negative[kDirectPerThread];
  int64_t label[kDirectPerThread];
  for (int i = 0; i < kDirectPerThread; ++i) label[i] = first_row + row + i < anchors ? batch.labels[first_row + row + i] : 0;
  if (batch.anchor_norm && threadIdx.x < kDirectTile) {
    const int64_t a = first_row + threadIdx.x;
    shared.zero_anchor[threadIdx.x] = a < anchors && batch.anchor_norm[a] == 0;
  }

  bool finite = true;
  for (int64_t tile = split; tile < column_tiles; tile += found.splits) {
    const int64_t first_column = tile * kDirectTile;
    __syncthreads();  // everybody is through with the tile before
    if (threadIdx.x < kDirectTile) {
      const int64_t j = first_column + threadIdx.x;
      shared.labels[threadIdx.x] = j < references ? batch.reference_labels[j] : 0;
      shared.zero_reference[threadIdx.x] = batch.reference_norm && j < references && batch.reference_norm[j] == 0;
    }
    T square[kDirectPerThread][kDirectPerThread] = {};
    for (int64_t k0 = 0; k0 < depth; k0 += kDirectDepth) {
      __syncthreads();
      load_direct<S>(batch.anchors, batch.anchor_norm, first_row, k0, shared.anchors);
      load_direct<S>(batch.references, batch.reference_norm, first_column, k0, shared.references);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDirectDepth; ++k) {
        T a[kDirectPerThread], b[kDirectPerThread];
        for (int i = 0; i < kDirectPerThread; ++i) a[i] = shared.anchors[k][row + i];
        for (int j = 0; j < kDirectPerThread; ++j) b[j] = shared.references[k][column + j];
        for (int i = 0; i < kDirectPerThread; ++i) {
          for (int j = 0; j < kDirectPerThread; ++j) {
            const T difference = a[i] - b[j];
            square[i][j] += difference * difference;
          }
        }
      }
    }
    for (int i = 0; i < kDirectPerThread; ++i) {
      for (int j = 0; j < kDirectPerThread; ++j) {
        const int64_t a = first_row + row + i, b = first_column + column + j;
        if (a >= anchors || b >= references) continue;
        T v = square[i][j];
        finite = finite && v < infinity<T>();
        // A zero row is at cosine distance 1, that is at a squared distance of 2, from everyone.
        if (batch.anchor_norm && (shared.zero_anchor[row + i] || shared.zero_reference[column + j])) v = 2;
        if (label[i] != shared.labels[column + j]) {
          negative[i].improve(v, int32_t(b));
        } else if (!(batch.self_form && a == b)) {
          positive[i].improve(v, int32_t(b));
        }
      }
    }
  }
  if (!finite) atomicOr(&batch.flags->not_finite, 1);

  T* values = static_cast<T*>(found.values);
  for (int i = 0; i < kDirectPerThread; ++i) {
    for (int bits = kDirectSide / 2; bits > 0; bits /= 2) {  // over the threads that share these anchors
      const T p = __shfl_xor_sync(kAllLanes, positive[i].value, bits), n = __shfl_xor_sync(kAllLanes, negative[i].value, bits);
      const int32_t pi = __shfl_xor_sync(kAllLanes, positive[i].index, bits), ni = __shfl_xor_sync(kAllLanes, negative[i].index, bits);
      positive[i].improve(p, pi);
      negative[i].improve(n, ni);
    }
    const int64_t a = first_row + row + i;
    if (column != 0 || a >= anchors) continue;
    const int64_t at = split * anchors + a, other = found.splits * anchors;
    values[at] = positive[i].value;
    found.indices[at] = positive[i].index;
    values[other + at] = negative[i].value;
    found.indices[other + at] = negative[i].index;
  }
}

}  // namespace deepsim::cuda
