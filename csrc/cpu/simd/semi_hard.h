// Semi-hard mining: for every positive of an anchor the nearest negative that is farther, and for every anchor the farthest one.
//
// Lanes are anchors: a tile is looked at as it stands for its columns, and transposed for its rows. What a tile has to offer is found
// without a branch, and seldom enough beats what is known that only then it is asked whose it is. Order of search never matters: the
// better distance wins, then the lower original index.
#pragma once

#include "batch_all.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// `found` is the best in each column of a tile, kPanelRows apart, among rows that `original` names. Takes the place of values and
// indices that it is better than, or as good as with a lower index.
template <class T, class IsBetter>
DEEPSIM_INLINE void improve(T* value, int32_t* index, Vec<T> found, const T* tile, const int32_t* original, IsBetter is_better) {
  constexpr int64_t NR = kPanelRows<T>;
  UnsignedLanes<T> lowest = ~UnsignedLanes<T>{};
  for (int64_t r = 0; r < NR; ++r) {
    const UnsignedLanes<T> others = (UnsignedLanes<T>)(load(tile + r * NR) != found);  // all bits, which no index has
    const UnsignedLanes<T> own = others | (UnsignedLanes<T>{} + uint32_t(original[r]));
    lowest = own < lowest ? own : lowest;
  }
  const Vec<T> known = load(value);
  const Lanes<T> known_index = load_lanes<T>(index), better = is_better(found, known);
  const Lanes<T> ties = (found == known) & (found < kFar<T>) & (lowest < (UnsignedLanes<T>)known_index);
  store_lanes<T>(index, (better | ties) ? (Lanes<T>)lowest : known_index);
  store(value, better ? found : known);
}

// One of many positives: only the nearest that the negative is farther than takes note of it. Who reads the list hands it on to the
// positives after that one.
template <class T>
inline void offer_by_search(const SemiHardLists<T>& l, int64_t panel, int64_t width, const T* tile, const int32_t* original) {
  constexpr int64_t NR = kPanelRows<T>;
  const auto take = [](T& value, int32_t& index, T d, int32_t i, bool better) {
    if (!better && !(d == value && i < index)) return;
    value = d;
    index = i;
  };
  for (int64_t c = 0; c < NR; ++c) {
    const int64_t first = l.begin[panel] + c, row = panel * NR + c;
    for (int64_t r = 0; r < NR; ++r) {
      const T d = tile[r * NR + c];
      if (d == kFar<T>) continue;
      take(l.farthest[row], l.farthest_index[row], d, original[r], d > l.farthest[row]);
      const int64_t p = run_length<true>(l.positive + first, width, T(0), d);
      if (p == width) continue;
      T& nearest = l.nearest[first + p * NR];
      take(nearest, l.nearest_index[first + p * NR], d, original[r], d < nearest);
    }
  }
}

// Shows a panel of anchors a tile of distances, column c that of anchor c; rows are those of `original`.
template <class T>
inline void offer(const SemiHardLists<T>& l, int64_t panel, const T* tile, const int32_t* original) {
  constexpr int64_t W = kLanes<T>, NR = kPanelRows<T>;
  const int64_t width = (l.begin[panel + 1] - l.begin[panel]) / NR;
  if (width == 0) return;
  if (width > kScannedPositives) return offer_by_search(l, panel, width, tile, original);
  const Vec<T> far = broadcast(kFar<T>);
  for (int64_t c = 0; c < NR; c += W, tile += W) {
    Vec<T> farthest = broadcast(T(-1));
    for (int64_t r = 0; r < NR; ++r) {
      const Vec<T> d = load(tile + r * NR), candidate = d < far ? d : farthest;
      farthest = farthest < candidate ? candidate : farthest;
    }
    const int64_t row = panel * NR + c;
    if (bits_le(load(l.farthest + row), farthest) != 0)
      improve(l.farthest + row, l.farthest_index + row, farthest, tile, original, [](auto a, auto b) { return a > b; });
    for (int64_t p = 0; p < width; ++p) {
      const int64_t at = l.begin[panel] + p * NR + c;
      const Vec<T> positive = load(l.positive + at);
      Vec<T> nearest[2] = {far, far};
      for (int64_t r = 0; r < NR; r += 2) {
        for (int chain = 0; chain < 2; ++chain) {
          const Vec<T> d = load(tile + (r + chain) * NR), candidate = positive < d ? d : far;
          nearest[chain] = candidate < nearest[chain] ? candidate : nearest[chain];
        }
      }
      const Vec<T> found = nearest[0] < nearest[1] ? nearest[0] : nearest[1];
      if ((bits_le(found, load(l.nearest + at)) & bits_lt(found, far)) != 0)
        improve(l.nearest + at, l.nearest_index + at, found, tile, original, [](auto a, auto b) { return a < b; });
    }
  }
}

template <class T>
void semi_hard(const SemiHardBlock<T>& b) {
  constexpr int64_t NR = kPanelRows<T>;
  walk_tiles(b.tiles, [&](T* tile, int64_t row, int64_t column, bool mixed, bool both) {
    half_squares(b.tiles, tile, row, column);
    distances(tile, b.distance);
    if (mixed) mask_positives(b.tiles, row, column, tile, kFar<T>);
    if (both) offer(b.columns, column / NR, tile, b.tiles.rows.original + row);
    alignas(64) T transposed[NR * NR];
    transpose_tile(tile, transposed);
    offer(b.rows, row / NR, transposed, b.tiles.columns.original + column);
  });
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
