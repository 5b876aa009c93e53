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

// The farthest negatives in the first kLanes columns of a tile, which are those of the packed rows from `row` on.
template <class T>
DEEPSIM_INLINE void offer_farthest(const SemiHardLists<T>& l, int64_t row, const T* tile, const int32_t* original) {
  constexpr int64_t NR = kPanelRows<T>;
  const Vec<T> far = broadcast(kFar<T>);
  Vec<T> farthest = broadcast(T(-1));
  for (int64_t r = 0; r < NR; ++r) {
    const Vec<T> d = load(tile + r * NR), candidate = d < far ? d : farthest;
    farthest = farthest < candidate ? candidate : farthest;
  }
  if (bits_le(load(l.farthest + row), farthest) != 0)
    improve(l.farthest + row, l.farthest_index + row, farthest, tile, original, [](auto a, auto b) { return a > b; });
}

// Many positives: only the nearest that the negative is farther than takes note of it. Who reads the list hands it on to the positives
// after that one.
template <class T>
inline void offer_by_search(const SemiHardLists<T>& l, int64_t panel, int64_t width, const T* tile, const int32_t* original) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>, NV = kMicroVectors;
  const T* list = l.positive + l.begin[panel];
  T* nearest = l.nearest + l.begin[panel];
  int32_t* nearest_index = l.nearest_index + l.begin[panel];
  Lanes<T> first[NV], beyond = {};
  for (int c = 0; c < NR; ++c) first[c / W][c % W] = c;
  for (int lane = 0; lane < W; ++lane) beyond[lane] = width;
  for (int64_t r = 0; r < NR; ++r) {
    Vec<T> d[NV];
    for (int v = 0; v < NV; ++v) d[v] = load(tile + r * NR + v * W);
    const Runs<T> farther = search_runs<true>(list, first, width, T(0), d);
    for (int v = 0; v < NV; ++v) {
      const Lanes<T> exists = (farther.length[v] < beyond) & (d[v] < kFar<T>);
      const Lanes<T> at = exists ? farther.end[v] : first[v];
      const Vec<T> candidate = exists ? d[v] : broadcast(kFar<T>);
      for (uint32_t bits = bits_le(candidate, gather(nearest, at)) & bits_lt(candidate, broadcast(kFar<T>)); bits != 0; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        const int64_t p = at[lane];
        if (candidate[lane] == nearest[p] && nearest_index[p] < original[r]) continue;
        nearest[p] = candidate[lane];
        nearest_index[p] = original[r];
      }
    }
  }
}

// Shows a panel of anchors a tile of distances, column c that of anchor c; rows are those of `original`.
template <class T>
inline void offer(const SemiHardLists<T>& l, int64_t panel, const T* tile, const int32_t* original) {
  constexpr int64_t W = kLanes<T>, NR = kPanelRows<T>;
  const int64_t width = (l.begin[panel + 1] - l.begin[panel]) / NR;
  if (width == 0) return;
  for (int64_t c = 0; c < NR; c += W) offer_farthest(l, panel * NR + c, tile + c, original);
  if (width > kScannedPositives) return offer_by_search(l, panel, width, tile, original);
  const Vec<T> far = broadcast(kFar<T>);
  for (int64_t c = 0; c < NR; c += W, tile += W) {
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
