// Batch-hard mining of one rectangle of panels: the reduction of a tile's rows and columns while it is in L1.
//
// The value of a pair is e = |a|^2/2 + |b|^2/2 - ab = |a - b|^2 / 2, the same bits for (i, j) and (j, i). A tile is
// swept with one comparison per register against the best so far; only where that says "as good or better", ever more
// seldom as the search goes on, are single elements looked at. Order of search never matters: the smaller value wins, then
// the lower original index. NaN compares false and is never chosen.
#pragma once

#include "tile_walk.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class T>
DEEPSIM_INLINE void improve_negative(const Extremes<T>& best, int64_t at, T value, int32_t index) {
  if (value < best.negative[at] || (value == best.negative[at] && index < best.negative_index[at])) {
    best.negative[at] = value;
    best.negative_index[at] = index;
  }
}

template <class T>
DEEPSIM_INLINE void improve_positive(const Extremes<T>& best, int64_t at, T value, int32_t index) {
  if (value > best.positive[at] || (value == best.positive[at] && index < best.positive_index[at])) {
    best.positive[at] = value;
    best.positive_index[at] = index;
  }
}

// Improves on the best of row r by the candidates in `bits`: elements of value, as stored at `values`. Each that does so rules out
// more of the others.
template <class T>
DEEPSIM_INLINE void improve_row_negative(const Extremes<T>& best, int64_t r, Vec<T> value, uint32_t bits, const T* values,
                                         const int32_t* original) {
  bits &= bits_le(value, broadcast(best.negative[r]));
  while (bits) {
    const int l = __builtin_ctz(bits);
    improve_negative(best, r, values[l], original[l]);
    bits &= (bits - 1) & bits_le(value, broadcast(best.negative[r]));
  }
}

template <class T>
DEEPSIM_INLINE void improve_row_positive(const Extremes<T>& best, int64_t r, Vec<T> value, uint32_t bits, const T* values,
                                         const int32_t* original) {
  bits &= bits_le(broadcast(best.positive[r]), value);
  while (bits) {
    const int l = __builtin_ctz(bits);
    improve_positive(best, r, values[l], original[l]);
    bits &= (bits - 1) & bits_le(broadcast(best.positive[r]), value);
  }
}

// Replaces the products in row r of a tile by the pairs' values.
template <class T>
DEEPSIM_INLINE void values_from_products(T* row, T half_norm, const Vec<T>* column_half_norm, Vec<T>* value) {
  for (int v = 0; v < kMicroVectors; ++v) {
    T* p = row + v * kLanes<T>;
    value[v] = (column_half_norm[v] + half_norm) - load(p);
    store(p, value[v]);
  }
}

// A tile in which no row shares a column's label.
template <class T, bool kColumns>
inline void reduce_negatives(T* tile, const T* row_half_norm, const int32_t* row_original, const T* column_half_norm,
                             const int32_t* column_original, const Extremes<T>& row_best, const Extremes<T>& column_best) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>, NV = kMicroVectors;
  Vec<T> half_norm[NV], smallest[NV];
  for (int v = 0; v < NV; ++v) {
    half_norm[v] = load(column_half_norm + v * W);
    smallest[v] = broadcast(T(__builtin_inf()));
  }
  for (int r = 0; r < NR; ++r) {
    Vec<T> value[NV];
    values_from_products(tile + r * NR, row_half_norm[r], half_norm, value);
    Vec<T> row_smallest = value[0];
    for (int v = 0; v < NV; ++v) {
      row_smallest = value[v] < row_smallest ? value[v] : row_smallest;
      if constexpr (kColumns) smallest[v] = value[v] < smallest[v] ? value[v] : smallest[v];
    }
    if (__builtin_expect(bits_le(row_smallest, broadcast(row_best.negative[r])) != 0, 0)) {
      for (int v = 0; v < NV; ++v) {
        improve_row_negative(row_best, r, value[v], ~0u, tile + r * NR + v * W, column_original + v * W);
      }
    }
  }
  if constexpr (kColumns) {
    for (int v = 0; v < NV; ++v) {
      const uint32_t improved = bits_le(smallest[v], load(column_best.negative + v * W));
      for (int r = 0; improved != 0 && r < NR; ++r) {
        const T* values = tile + r * NR + v * W;
        for (uint32_t bits = improved & bits_le(load(values), smallest[v]); bits; bits &= bits - 1) {
          const int l = __builtin_ctz(bits);
          improve_negative(column_best, v * W + l, values[l], row_original[r]);
        }
      }
    }
  }
}

// Bits l with begin <= first + l < end.
template <class T>
DEEPSIM_INLINE uint32_t bits_between(int64_t begin, int64_t end, int64_t first) {
  const auto clamp = [](int64_t x) { return x < 0 ? int64_t(0) : x > kLanes<T> ? int64_t(kLanes<T>) : x; };
  return uint32_t((uint64_t(1) << clamp(end - first)) - (uint64_t(1) << clamp(begin - first)));
}

// A tile that holds positives as well. `row`, `column` are the packed positions of its first row and column.
template <class T>
inline void reduce_mixed(const TileBlock<T>& m, T* tile, int64_t row, int64_t column, bool update_columns,
                         const Extremes<T>& row_best, const Extremes<T>& column_best) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>, NV = kMicroVectors;
  constexpr uint32_t kAll = uint32_t((uint64_t(1) << W) - 1);
  Vec<T> half_norm[NV];
  for (int v = 0; v < NV; ++v) half_norm[v] = load(m.columns.half_norm + column + v * W);
  for (int r = 0; r < NR && row + r < m.row_count; ++r) {
    Vec<T> value[NV];
    values_from_products(tile + r * NR, m.rows.half_norm[row + r], half_norm, value);
    for (int v = 0; v < NV; ++v) {
      const int64_t first = column + v * W;
      const uint32_t same_label = bits_between<T>(m.positive_begin[row + r], m.positive_end[row + r], first);
      const uint32_t self = m.symmetric ? bits_between<T>(row + r, row + r + 1, first) : 0u;
      const uint32_t negatives = kAll & ~same_label, positives = same_label & ~self;
      const T* values = tile + r * NR + v * W;
      const int32_t* original = m.columns.original + first;
      improve_row_negative(row_best, r, value[v], negatives, values, original);
      improve_row_positive(row_best, r, value[v], positives, values, original);
      if (!update_columns) continue;
      const int32_t index = m.rows.original[row + r];
      for (uint32_t bits = negatives & bits_le(value[v], load(column_best.negative + v * W)); bits; bits &= bits - 1) {
        const int l = __builtin_ctz(bits);
        improve_negative(column_best, v * W + l, values[l], index);
      }
      for (uint32_t bits = positives & bits_le(load(column_best.positive + v * W), value[v]); bits; bits &= bits - 1) {
        const int l = __builtin_ctz(bits);
        improve_positive(column_best, v * W + l, values[l], index);
      }
    }
  }
}

template <class T>
DEEPSIM_INLINE Extremes<T> offset(const Extremes<T>& e, int64_t by) {
  return {e.negative + by, e.positive + by, e.negative_index + by, e.positive_index + by};
}

template <class T>
void mine(const MineBlock<T>& m) {
  constexpr int64_t NR = kPanelRows<T>;
  walk_tiles(m.tiles, [&](T* tile, int64_t row, int64_t column, bool mixed, bool mirrored) {
    const bool both = mirrored || m.of_columns;
    const Extremes<T> row_best = offset(m.row_best, row - m.tiles.row_begin * NR);
    const Extremes<T> column_best = offset(m.column_best, column - m.tiles.column_begin * NR);
    if (mixed) {
      reduce_mixed(m.tiles, tile, row, column, both, row_best, column_best);
    } else {
      const PackedRows<T>&rows = m.tiles.rows, &columns = m.tiles.columns;
      const auto reduce = both ? reduce_negatives<T, true> : reduce_negatives<T, false>;
      reduce(tile, rows.half_norm + row, rows.original + row, columns.half_norm + column, columns.original + column, row_best,
             column_best);
    }
  });
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
