// Anchors whose choice by tiles is not to be relied on choose again, by direct differences.
#pragma once

#include "../common/choose_again.h"
#include "block.cuh"
#include "key.cuh"
#include "rows.cuh"

namespace deepsim::cuda {

constexpr int kChoosingAnchors = kBlockWarps;  // of a block

struct ChoosingShared {
  bool positive_again[kChoosingAnchors], negative_again[kChoosingAnchors];
  double value[kBlockWarps];
  int32_t index[kBlockWarps];
};

template <class S>
__device__ __forceinline__ double distance_of(const Batch& batch, int64_t anchor, int64_t reference) {
  const double norm = batch.anchor_norm ? batch.anchor_norm[anchor] : 1.0;
  const double other_norm = batch.reference_norm ? batch.reference_norm[reference] : 1.0;
  return distance_between(row_of<S>(batch.anchors, anchor), row_of<S>(batch.references, reference), batch.anchors.depth, batch.distance,
                          norm, other_norm);
}

// Only the index of a key is read from now on.
template <bool kLargest>
__device__ __forceinline__ void replace_index(unsigned long long& key, Best<double, kLargest> best, ChoosingShared& shared) {
  best = block_best(best, shared.value, shared.index);
  if (threadIdx.x == 0 && best.index != kNobody) key = key >> 32 << 32 | ~uint32_t(best.index);
}

// A block for some packed anchors, one after the other; a warp for a pair. Keys are those of packed rows.
template <class S>
__global__ void __launch_bounds__(kBlockThreads, 2) choose_again_kernel(Batch batch, TileMining mining) {
  auto& shared = shared_memory<ChoosingShared>();
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t first = int64_t(blockIdx.x) * kChoosingAnchors;
  const Keys keys = mining.anchor_keys;
  if (batch.flags->not_finite) return;
  if (lane_index() == 0) {
    const int64_t p = first + warp;
    const bool inside = p < batch.anchors.count;
    const unsigned long long positive = inside ? keys.positive[p] : 0, negative = inside ? keys.negative[p] : 0;
    const float half_norm = inside ? mining.anchors.half_norm[p] : 0;
    shared.positive_again[warp] = positive != 0 && has_lost_digits(value_of_key(positive), half_norm);
    shared.negative_again[warp] = negative != 0 && has_lost_digits(-value_of_key(negative), half_norm);
  }
  __syncthreads();
  for (int k = 0; k < kChoosingAnchors; ++k) {
    const int64_t p = first + k;
    if (shared.positive_again[k]) {
      const int64_t a = mining.anchors.original[p];
      const int32_t label = mining.anchors.label_id[p];
      Best<double, true> best;
      // A label is called by twice its first position among the references (pack.cuh), where its rows are adjacent.
      for (int64_t q = label / 2 + warp; q < batch.references.count && mining.references.label_id[q] == label; q += kBlockWarps) {
        const int64_t j = mining.references.original[q];
        if (!(batch.self_form && j == a)) best.improve(distance_of<S>(batch, a, j), int32_t(j));
      }
      replace_index(keys.positive[p], best, shared);
    }
    if (shared.negative_again[k]) {
      const int64_t a = mining.anchors.original[p];
      Best<double, false> best;
      for (int64_t j = warp; j < batch.references.count; j += kBlockWarps)
        if (batch.labels[a] != batch.reference_labels[j]) best.improve(distance_of<S>(batch, a, j), int32_t(j));
      replace_index(keys.negative[p], best, shared);
    }
  }
}

}  // namespace deepsim::cuda
