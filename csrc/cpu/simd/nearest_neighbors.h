// k nearest neighbours: every row collects the columns that are not farther than the k-th nearest known so far, and whenever its
// list is full, all but the nearest k are dropped. Order of search never matters: nobody who is among the nearest is ever turned away.
#pragma once

#include "pair_distances.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class T>
DEEPSIM_INLINE void make_room(const NeighborLists<T>& l, int64_t row) {
  if (l.count[row] + kPanelRows<T> > l.capacity)
    l.keep_nearest(l.value + row * l.capacity, l.index + row * l.capacity, l.count + row, l.limit + row, l.k);
}

template <class T>
DEEPSIM_INLINE void collect(const NeighborLists<T>& l, int64_t row, T value, int32_t index) {
  const int64_t at = row * l.capacity + l.count[row]++;
  l.value[at] = value;
  l.index[at] = index;
}

template <class T>
void nearest_neighbors(const NeighborBlock<T>& b) {
  constexpr int64_t W = kLanes<T>, NR = kPanelRows<T>;
  walk_tiles(b.tiles, [&](T* tile, int64_t row, int64_t column, bool mixed, bool both) {
    half_squares(b.tiles, tile, row, column);
    if (mixed) mask_positives(b.tiles, row, column, tile, T(__builtin_inf()));
    const int32_t *row_index = b.tiles.rows.original + row, *column_index = b.tiles.columns.original + column;
    for (int64_t r = 0; r < NR && row + r < b.tiles.row_count; ++r) {
      make_room(b.rows, row + r);
      const Vec<T> limit = broadcast(b.rows.limit[row + r]);
      for (int64_t c = 0; c < NR; c += W) {
        for (uint32_t bits = bits_le(load(tile + r * NR + c), limit); bits; bits &= bits - 1) {
          const int64_t l = c + __builtin_ctz(bits);
          collect(b.rows, row + r, tile[r * NR + l], column_index[l]);
        }
      }
    }
    if (!both) return;
    for (int64_t c = 0; c < NR; ++c) make_room(b.columns, column + c);
    for (int64_t c = 0; c < NR; c += W) {
      const Vec<T> limit = load(b.columns.limit + column + c);
      for (int64_t r = 0; r < NR; ++r) {
        for (uint32_t bits = bits_le(load(tile + r * NR + c), limit); bits; bits &= bits - 1) {
          const int64_t l = c + __builtin_ctz(bits);
          collect(b.columns, column + l, tile[r * NR + l], row_index[r]);
        }
      }
    }
  });
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
