// Batch-all triplet loss: what a tile of negatives adds to it.
//
// A negative at distance d is active with the positives p of its anchor for which d_ap + margin > d. The anchor's positive distances
// stand sorted, the largest first, so these are a run of its list: short lists are compared one by one, long ones searched.
#pragma once

#include "pair_distances.h"
#include "pull.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// In the semi-hard form a negative must also be farther than the positive; one at exactly d_ap + margin belongs to it, without a loss.
template <class T>
struct ActiveTile {
  alignas(64) T active[kPanelRows<T> * kPanelRows<T>] = {};   // positives with which the pair has a loss > 0, of both its anchors
  alignas(64) T counted[kPanelRows<T> * kPanelRows<T>] = {};  // only semi-hard: positives that make a triplet with it
};

// Runs of elements at the heads of sorted lists, one in each lane: how long it is, and where what follows it would stand.
template <class T>
struct Runs {
  Lanes<T> length[kMicroVectors] = {}, end[kMicroVectors];
};

// Those with element + add > d, or >= d. A lane's list begins at list[first], its elements kPanelRows apart; all have `width` elements,
// fewer than 2^31 / kPanelRows.
template <bool kOrEqual, class T>
DEEPSIM_INLINE Runs<T> search_runs(const T* list, const Lanes<T> (&first)[kMicroVectors], int64_t width, T add,
                                   const Vec<T> (&d)[kMicroVectors]) {
  using Lane = std::remove_reference_t<decltype(Lanes<T>{}[0])>;
  constexpr Lane NR = kPanelRows<T>;
  Runs<T> runs;
  for (int v = 0; v < kMicroVectors; ++v) runs.end[v] = first[v];
  for (int64_t left = width; left > 0; left /= 2) {
    const Lane half = Lane((left + 1) / 2);
#pragma GCC unroll 8
    for (int v = 0; v < kMicroVectors; ++v) {
      const Vec<T> limit = gather(list, runs.end[v] + (half - 1) * NR) + add;
      const Lanes<T> within = kOrEqual ? limit >= d[v] : limit > d[v];
      runs.length[v] += within & half;
      runs.end[v] += within & (half * NR);
    }
  }
  return runs;
}

// A row of pairs by binary search. A run of active positives is noted at both of its ends; who reads `active` adds up from the end of
// the list.
template <class T, bool kSemiHard>
inline void search_row(const T* distance, const T* list, const Lanes<T> (&first)[kMicroVectors], int64_t width, T margin, T* active,
                       T* tile_active, T* tile_counted) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>, NV = kMicroVectors;
  Vec<T> d[NV];
  for (int v = 0; v < NV; ++v) d[v] = load(distance + v * W);
  const Runs<T> ends = search_runs<false>(list, first, width, margin, d);
  Runs<T> begins;
  if constexpr (kSemiHard) {
    begins = search_runs<true>(list, first, width, T(0), d);
    const Runs<T> counted = search_runs<true>(list, first, width, margin, d);
    for (int v = 0; v < NV; ++v) {
      T* out = tile_counted + v * W;
      store(out, load(out) + __builtin_convertvector(counted.length[v] - begins.length[v], Vec<T>));
    }
  }
  for (int v = 0; v < NV; ++v) {
    const Vec<T> none = {}, run = __builtin_convertvector(ends.length[v] - begins.length[v], Vec<T>);
    store(tile_active + v * W, load(tile_active + v * W) + (run > none ? run : none));
    for (uint32_t bits = bits_lt(none, run); bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      active[ends.end[v][lane] - NR] += 1;
      if (kSemiHard && begins.length[v][lane] > 0) active[begins.end[v][lane] - NR] -= 1;
    }
  }
}

// count += 1 where low < d < high (low left out unless semi-hard); says for which lanes.
template <class T, bool kSemiHard>
DEEPSIM_INLINE uint32_t count_between(Vec<T>& count, Vec<T> low, Vec<T> d, Vec<T> high) {
  if constexpr (kSemiHard) return count_lt(count, low < d ? d : broadcast(kFar<T>), high);
  return count_lt(count, d, high);
}

template <class T, bool kSemiHard>
inline void rows_as_anchors(const T* distance, const T* lists, int64_t width, T margin, T* active, ActiveTile<T>& tile) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>, NV = kMicroVectors;
  for (int r = 0; r < NR && width > 0; ++r) {
    Vec<T> d[NV], count[NV] = {}, counted[NV] = {};
    uint32_t any = 0;
    for (int v = 0; v < NV; ++v) {
      d[v] = load(distance + r * NR + v * W);
      any |= bits_le(d[v], broadcast(T(lists[r] + margin)));
    }
    if (!any) continue;
    if (width > kScannedPositives) {
      const Lanes<T> one_list[NV] = {};
      search_row<T, kSemiHard>(distance + r * NR, lists + r, one_list, width, margin, active + r, tile.active + r * NR,
                               tile.counted + r * NR);
      continue;
    }
    for (int64_t p = 0; p < width && any; ++p) {
      const T d_ap = lists[p * NR + r];
      const Vec<T> low = broadcast(d_ap), high = broadcast(T(d_ap + margin));
      int found = 0;
      any = 0;
      for (int v = 0; v < NV; ++v) {
        found += __builtin_popcount(count_between<T, kSemiHard>(count[v], low, d[v], high));
        any |= bits_le(d[v], high);
        if constexpr (kSemiHard) counted[v] += (low < d[v]) & (d[v] <= high) ? broadcast(T(1)) : Vec<T>{};
      }
      active[p * NR + r] += T(found);
    }
    for (int v = 0; v < NV; ++v) {
      T* out = tile.active + r * NR + v * W;
      store(out, load(out) + count[v]);
      if constexpr (kSemiHard) store(tile.counted + r * NR + v * W, load(tile.counted + r * NR + v * W) + counted[v]);
    }
  }
}

template <class T, bool kSemiHard>
inline void columns_as_anchors(const T* distance, const T* lists, int64_t width, T margin, T* active, ActiveTile<T>& tile) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>, kRows = 4;
  static_assert(NR % kRows == 0);
  if (width > kScannedPositives) {
    Lanes<T> lists_of_lanes[kMicroVectors];
    for (int c = 0; c < NR; ++c) lists_of_lanes[c / W][c % W] = c;
    for (int r = 0; r < NR; ++r)
      search_row<T, kSemiHard>(distance + r * NR, lists, lists_of_lanes, width, margin, active, tile.active + r * NR,
                               tile.counted + r * NR);
    return;
  }
  for (int v = 0; v < kMicroVectors; ++v) {
    for (int first = 0; first < NR; first += kRows) {
      Vec<T> d[kRows], count[kRows], counted[kRows];
      for (int r = 0; r < kRows; ++r) {
        d[r] = load(distance + (first + r) * NR + v * W);
        count[r] = load(tile.active + (first + r) * NR + v * W);
        if constexpr (kSemiHard) counted[r] = load(tile.counted + (first + r) * NR + v * W);
      }
      uint32_t any = 1;
      for (int64_t p = 0; p < width && any; ++p) {
        const Vec<T> low = load(lists + p * NR + v * W), high = low + margin;
        Vec<T> found = load(active + p * NR + v * W);
        any = 0;
        for (int r = 0; r < kRows; ++r) {
          any |= count_between<T, kSemiHard>(count[r], low, d[r], high);
          count_between<T, kSemiHard>(found, low, d[r], high);
          if constexpr (kSemiHard) {
            any |= bits_le(d[r], high);
            counted[r] += (low < d[r]) & (d[r] <= high) ? broadcast(T(1)) : Vec<T>{};
          }
        }
        store(active + p * NR + v * W, found);
      }
      for (int r = 0; r < kRows; ++r) {
        store(tile.active + (first + r) * NR + v * W, count[r]);
        if constexpr (kSemiHard) store(tile.counted + (first + r) * NR + v * W, counted[r]);
      }
    }
  }
}

template <class T>
DEEPSIM_INLINE double lane_sum(Vec<T> v) {
  double sum = 0;
  for (int l = 0; l < kLanes<T>; ++l) sum += double(v[l]);
  return sum;
}

template <class T, bool kSemiHard>
inline void batch_all_block(const BatchAllBlock<T>& b, BatchAllSums& sums) {
  constexpr int64_t W = kLanes<T>, NR = kPanelRows<T>;
  walk_tiles(b.tiles, [&](T* distance, int64_t row, int64_t column, bool mixed, bool both) {
    const bool close = half_squares(b.tiles, distance, row, column);
    distances(distance, b.distance);
    if (mixed) mask_positives(b.tiles, row, column, distance, kFar<T>);

    ActiveTile<T> tile;
    const int64_t i = row / NR, j = column / NR;
    const auto width = [](const SortedPositives<T>& p, int64_t panel) { return (p.begin[panel + 1] - p.begin[panel]) / kPanelRows<T>; };
    rows_as_anchors<T, kSemiHard>(distance, b.rows.distance + b.rows.begin[i], width(b.rows, i), b.margin,
                                  b.rows.active + b.rows.begin[i], tile);
    if (both) {
      columns_as_anchors<T, kSemiHard>(distance, b.columns.distance + b.columns.begin[j], width(b.columns, j), b.margin,
                                       b.columns.active + b.columns.begin[j], tile);
    }

    Vec<T> active = {}, active_d = {}, counted = {}, counted_d = {};
    const Vec<T> far = broadcast(kFar<T>);
    for (int64_t r = 0; r < NR; ++r) {
      for (int64_t c = 0; c < NR; c += W) {
        const Vec<T> d = load(distance + r * NR + c), n = load(tile.active + r * NR + c);
        active += n;
        active_d += n * d;
        Vec<T> triplets;
        if constexpr (kSemiHard) {
          triplets = load(tile.counted + r * NR + c);
        } else {
          triplets = broadcast(b.rows.count[row + r]);
          if (both) triplets += load(b.columns.count + column + c);
          triplets = d < far ? triplets : Vec<T>{};
        }
        counted += triplets;
        counted_d += triplets * d;
        store(tile.active + r * NR + c, -n);
      }
    }
    const double found = lane_sum<T>(active);
    sums.active += int64_t(found);
    sums.active_d_an += lane_sum<T>(active_d);
    sums.triplets += int64_t(lane_sum<T>(counted));
    sums.d_an += lane_sum<T>(counted_d);
    if (found == 0 || b.row_gradient == nullptr) return;
    strengths(tile.active, distance, b.distance);
    pull_tile(b.tiles, row, column, tile.active, b.tiles.symmetric && !both, close, b.row_gradient, b.column_gradient);
  });
}

template <class T>
void batch_all(const BatchAllBlock<T>& block, BatchAllSums& sums) {
  block.semi_hard ? batch_all_block<T, true>(block, sums) : batch_all_block<T, false>(block, sums);
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
