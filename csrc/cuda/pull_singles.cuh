// From the strengths of single pairs to gradients, difference by difference: of those that products would lose, and of losses in which
// few pairs have any.
#pragma once

#include "all_pairs.h"
#include "rows.cuh"

namespace deepsim::cuda {

constexpr int kSingleElements = 4;  // of a row, by each lane
constexpr int kSingleDepth = kSingleElements * kWarp;

// One warp for kSingleDepth elements of a row: an anchor of the stripe, or a reference. It goes through the marks of the row's pairs 32 at
// a time, which lie in one word for an anchor and in as many for a reference.
template <class S, bool kAnchors>
__global__ void __launch_bounds__(256, 3) pull_singles_kernel(Pairs pairs, Stripe stripe, void* gradient) {
  using T = Compute<S>;
  if (pairs.flags->not_finite) return;
  const Rows &own = kAnchors ? pairs.anchors : pairs.references, &others = kAnchors ? pairs.references : pairs.anchors;
  const double* own_norm = kAnchors ? pairs.anchor_norm : pairs.reference_norm;
  const double* other_norm = kAnchors ? pairs.reference_norm : pairs.anchor_norm;
  const int64_t depth = own.depth, runs = (depth + kSingleDepth - 1) / kSingleDepth;
  const int64_t row = warp_index() / runs, first_element = warp_index() % runs * kSingleDepth + lane_index();
  if (row >= (kAnchors ? stripe.rows : own.count)) return;
  const int64_t own_row = kAnchors ? stripe.first + row : row, first_other = kAnchors ? 0 : stripe.first;
  const int64_t words = stripe.stride / 32;
  const T* strengths = static_cast<const T*>(stripe.single_strengths);

  T x[kSingleElements] = {}, sum[kSingleElements] = {};
  bool any = false;
  const auto element = [&](const Rows& of, const double* norm, int64_t r, int e) {
    const int64_t k = first_element + e * kWarp;
    return k < depth ? normalised<T>(row_of<S>(of, r)[k], norm, r) : T(0);
  };
  // Bit i of found: pulled by first + i.
  const auto add = [&](uint32_t found, int64_t first) {
    if (found != 0 && !any) {
      any = true;
      for (int e = 0; e < kSingleElements; ++e) x[e] = element(own, own_norm, own_row, e);
    }
    for (; found != 0; found &= found - 1) {
      const int64_t other = first + __ffs(found) - 1;
      const T s = strengths[kAnchors ? row * stripe.stride + other : other * stripe.stride + row];
      for (int e = 0; e < kSingleElements; ++e) sum[e] += s * (x[e] - element(others, other_norm, first_other + other, e));
    }
  };
  if constexpr (kAnchors) {
    for (int64_t first = 0; first < words; first += kWarp) {
      const uint32_t word = first + lane_index() < words ? stripe.single[row * words + first + lane_index()] : 0;
      for (uint32_t filled = __ballot_sync(kAllLanes, word != 0); filled != 0; filled &= filled - 1) {
        const int lane = __ffs(filled) - 1;
        add(__shfl_sync(kAllLanes, word, lane), (first + lane) * 32);
      }
    }
  } else {
    for (int64_t first = 0; first < stripe.rows; first += kWarp) {
      const int64_t other = first + lane_index();
      const bool marked = other < stripe.rows && (stripe.single[other * words + row / 32] >> row % 32 & 1);
      add(__ballot_sync(kAllLanes, marked), first);
    }
  }
  if (!any) return;
  T* to = static_cast<T*>(gradient) + own_row * depth;
  for (int e = 0; e < kSingleElements; ++e) {
    if (first_element + e * kWarp < depth) to[first_element + e * kWarp] += sum[e];
  }
}

}  // namespace deepsim::cuda
