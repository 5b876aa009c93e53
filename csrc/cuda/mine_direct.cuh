// Batch-hard mining by direct differences: every pair's |a - b|^2 in registers, every anchor's best so far beside it.
//
// Exact in every dtype and without any preparation: for float64, which tensor cores would not help, and for batches so small
// that packing would cost more than it gains. A block holds kDirectTile anchors and walks over its share of the references.
#pragma once

#include "block.cuh"
#include "direct_tile.cuh"

namespace deepsim::cuda {

template <class T>
struct DirectShared {
  DirectElements<T> elements;
  int64_t labels[kDirectTile];  // of the references
  bool zero_anchor[kDirectTile], zero_reference[kDirectTile];
};

template <class S>
__global__ void __launch_bounds__(kDirectThreads, 2) mine_direct_kernel(Batch batch, DirectFound found) {
  using T = Compute<S>;
  auto& shared = shared_memory<DirectShared<T>>();
  const int64_t anchors = batch.anchors.count, references = batch.references.count;
  const int64_t row_tiles = (anchors + kDirectTile - 1) / kDirectTile, column_tiles = (references + kDirectTile - 1) / kDirectTile;
  const int64_t first_row = blockIdx.x % row_tiles * kDirectTile;
  const int split = int(blockIdx.x / row_tiles);
  const int row = direct_row(), column = direct_column();

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
    T square[kDirectPerThread][kDirectPerThread];
    direct_squares<S>(shared.elements, batch.anchors, batch.anchor_norm, first_row, batch.references, batch.reference_norm, first_column,
                      square);
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
