// Semi-hard mining: for every positive of an anchor the nearest negative that is farther, and for every anchor the farthest one.
//
// Order of search never matters: the better distance wins, then the lower original index.
#pragma once

#include "batch_all.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// One anchor's lists, elements kPanelRows apart.
template <class T>
struct FartherNegatives {
  const T* positive;   // sorted, the farthest first
  int64_t width;
  T* nearest;          // [width], kFar where there is none yet
  int32_t* nearest_index;
  T* farthest;         // one, -1 where there is none yet
  int32_t* farthest_index;
};

template <class T>
DEEPSIM_INLINE void take_nearer(const FartherNegatives<T>& a, int64_t p, T d, int32_t index) {
  T& best = a.nearest[p * kPanelRows<T>];
  int32_t& best_index = a.nearest_index[p * kPanelRows<T>];
  if (d < best || (d == best && index < best_index)) {
    best = d;
    best_index = index;
  }
}

// In a long list only the nearest positive that the negative is farther than takes note of it: who reads the list hands it on to the
// positives after that one.
template <class T>
inline void offer_negative(const FartherNegatives<T>& a, T d, int32_t index) {
  if (a.width > kScannedPositives) {
    const int64_t p = run_length<true>(a.positive, a.width, T(0), d);
    if (p < a.width) take_nearer(a, p, d, index);
  } else {
    for (int64_t p = a.width - 1; p >= 0 && a.positive[p * kPanelRows<T>] < d; --p) take_nearer(a, p, d, index);
  }
  if (d > *a.farthest || (d == *a.farthest && index < *a.farthest_index)) {
    *a.farthest = d;
    *a.farthest_index = index;
  }
}

template <class T>
DEEPSIM_INLINE FartherNegatives<T> anchor(const SemiHardLists<T>& l, int64_t row) {
  constexpr int64_t NR = kPanelRows<T>;
  const int64_t panel = row / NR, at = l.begin[panel] + row % NR;
  return {l.positive + at,  (l.begin[panel + 1] - l.begin[panel]) / NR, l.nearest + at, l.nearest_index + at, l.farthest + row,
          l.farthest_index + row};
}

// Which of these distances could change something for their anchors: by lane, as bits. Broadcast or lane-wise, as `at` loads them.
template <class T, class Load>
DEEPSIM_INLINE uint32_t worth_offering(Vec<T> d, int64_t width, Load at, Vec<T> farthest, const T* positive, const T* nearest) {
  uint32_t bits = bits_le(farthest, d);
  if (width > kScannedPositives || width == 0) return ~0u;
  // A negative beyond the first list entry's best improves no entry.
  if (bits_le(d, at(nearest))) {
    for (int64_t p = 0; p < width; ++p) {
      const int64_t offset = p * kPanelRows<T>;
      bits |= bits_le(d, at(nearest + offset)) & ~bits_le(d, at(positive + offset));
    }
  }
  return bits;
}

template <class T>
void semi_hard(const SemiHardBlock<T>& b) {
  constexpr int64_t W = kLanes<T>, NR = kPanelRows<T>;
  walk_tiles(b.tiles, [&](T* distance, int64_t row, int64_t column, bool mixed, bool both) {
    half_squares(b.tiles, distance, row, column);
    distances(distance, b.distance);
    if (mixed) mask_positives(b.tiles, row, column, distance, kFar<T>);
    const Vec<T> far = broadcast(kFar<T>);
    const int32_t *row_index = b.tiles.rows.original + row, *column_index = b.tiles.columns.original + column;
    for (int64_t r = 0; r < NR && row + r < b.tiles.row_count; ++r) {
      const FartherNegatives<T> a = anchor(b.rows, row + r);
      if (a.width == 0) continue;
      for (int64_t c = 0; c < NR; c += W) {
        const Vec<T> d = load(distance + r * NR + c);
        const auto at = [](const T* element) { return broadcast(*element); };
        uint32_t bits = worth_offering<T>(d, a.width, at, broadcast(*a.farthest), a.positive, a.nearest) & bits_lt(d, far);
        for (; bits; bits &= bits - 1) {
          const int64_t l = c + __builtin_ctz(bits);
          offer_negative(a, distance[r * NR + l], column_index[l]);
        }
      }
    }
    if (!both) return;
    const FartherNegatives<T> first = anchor(b.columns, column);
    if (first.width == 0) return;
    for (int64_t c = 0; c < NR; c += W) {
      for (int64_t r = 0; r < NR; ++r) {
        const Vec<T> d = load(distance + r * NR + c);
        const auto at = [](const T* element) { return load(element); };
        uint32_t bits =
            worth_offering<T>(d, first.width, at, load(first.farthest + c), first.positive + c, first.nearest + c) & bits_lt(d, far);
        for (; bits; bits &= bits - 1) {
          const int64_t l = c + __builtin_ctz(bits);
          offer_negative(anchor(b.columns, column + l), distance[r * NR + l], row_index[r]);
        }
      }
    }
  });
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
