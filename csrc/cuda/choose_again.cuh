// Anchors whose choice by tiles is not to be relied on choose again, by direct differences.
#pragma once

#include "block.cuh"
#include "rows.cuh"

namespace deepsim::cuda {

// Tiles subtract |a|^2 and |b|^2 from twice ab. Where what is left is a smaller share of |a|^2 than this, it has lost too many digits.
constexpr float kLostShare = 1.0f / 512;

constexpr int kChoosingAnchors = kBlockWarps;  // of a block

struct ChoosingShared {
  int64_t anchor[kChoosingAnchors];  // -1 for those that keep their choice
  double value[kBlockWarps];
  int32_t index[kBlockWarps];
};

// What ordered_bits() in search_tile.cuh made a key's upper half of.
__device__ __forceinline__ float value_of_key(unsigned long long key) {
  const uint32_t bits = uint32_t(key >> 32);
  return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ bool has_lost_digits(unsigned long long key, float half_square, float half_norm) {
  return key != 0 && half_square < kLostShare * half_norm;
}

// One warp of the block for a pair at a time; keys are those of packed rows, of which only the index is read from now on.
template <class S>
__global__ void __launch_bounds__(kBlockThreads, 2) choose_again_kernel(Batch batch, TileMining mining) {
  auto& shared = shared_memory<ChoosingShared>();
  const int warp = int(threadIdx.x) / kWarp;
  const int64_t first = int64_t(blockIdx.x) * kChoosingAnchors;
  if (batch.flags->not_finite) return;
  if (lane_index() == 0) {
    const int64_t p = first + warp;
    const bool inside = p < batch.anchors.count;
    const unsigned long long positive = inside ? mining.positive[p] : 0, negative = inside ? mining.negative[p] : 0;
    const float half_norm = inside ? mining.anchors.half_norm[p] : 0;
    const bool again = has_lost_digits(positive, value_of_key(positive), half_norm) ||
                       has_lost_digits(negative, -value_of_key(negative), half_norm);
    shared.anchor[warp] = again ? mining.anchors.original[p] : -1;
  }
  __syncthreads();
  for (int chosen = 0; chosen < kChoosingAnchors; ++chosen) {
    const int64_t a = shared.anchor[chosen];
    if (a < 0) continue;  // the same for the whole block
    Best<double, true> positive;
    Best<double, false> negative;
    for (int64_t j = warp; j < batch.references.count; j += kBlockWarps) {
      if (batch.self_form && j == a) continue;
      const double norm = batch.anchor_norm ? batch.anchor_norm[a] : 1.0;
      const double other_norm = batch.reference_norm ? batch.reference_norm[j] : 1.0;
      const double d = distance_between(row_of<S>(batch.anchors, a), row_of<S>(batch.references, j), batch.anchors.depth,
                                        batch.distance, norm, other_norm);
      if (batch.labels[a] == batch.reference_labels[j]) {
        positive.improve(d, int32_t(j));
      } else {
        negative.improve(d, int32_t(j));
      }
    }
    positive = block_best(positive, shared.value, shared.index);
    negative = block_best(negative, shared.value, shared.index);
    if (threadIdx.x != 0) continue;
    const auto with_index = [](unsigned long long key, int32_t index) { return (key >> 32 << 32) | ~uint32_t(index); };
    const int64_t p = first + chosen;
    if (positive.index != kNobody) mining.positive[p] = with_index(mining.positive[p], positive.index);
    if (negative.index != kNobody) mining.negative[p] = with_index(mining.negative[p], negative.index);
  }
}

}  // namespace deepsim::cuda
