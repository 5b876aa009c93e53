// Tiles of distances, for losses that need their values and not only their order.
//
// |a|^2/2 + |b|^2/2 - ab loses its leading digits where a and b are close. A tile with such a pair is computed again by differences,
// and these take the place of the close pairs' values. It depends on the pair alone, not on its tile, whether it is close, so equal
// pairs keep equal distances.
#pragma once

#include "tile_walk.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// Close: |a - b|^2 / 2 below this share of |a|^2/2 + |b|^2/2. Other pairs lose five bits at most.
inline constexpr double kCloseShare = 1.0 / 32;

// What a distance is where there is no pair to count: finite, so that 0 times it is 0, and beyond every margin.
template <class T>
inline constexpr T kFar = sizeof(T) == 4 ? T(__FLT_MAX__) : T(__DBL_MAX__);

// tile[r][c] = sum over k of (a[k][r] - b[k][c])^2 / 2.
template <class T>
inline void tile_differences(const T* a, const T* b, int64_t depth, T* tile) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  for (int first = 0; first < NR; first += kMicroRows) {
    Vec<T> sum[kMicroRows][kMicroVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 8
      for (int v = 0; v < kMicroVectors; ++v) {
        const Vec<T> right = load(b + k * NR + v * W);
#pragma GCC unroll 8
        for (int r = 0; r < kMicroRows; ++r) {
          const Vec<T> difference = broadcast(a[k * NR + first + r]) - right;
          sum[r][v] += difference * difference;
        }
      }
    }
    for (int r = 0; r < kMicroRows; ++r)
      for (int v = 0; v < kMicroVectors; ++v) store(tile + (first + r) * NR + v * W, sum[r][v] * T(0.5));
  }
}

// Replaces a tile of products by |a - b|^2 / 2; infinite where a row is filling. Says whether there was a close pair.
template <class T>
inline bool half_squares(const TileBlock<T>& m, T* tile, int64_t row, int64_t column) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  uint32_t close = 0;
  for (int r = 0; r < NR; ++r) {
    for (int v = 0; v < kMicroVectors; ++v) {
      const Vec<T> both = load(m.columns.half_norm + column + v * W) + m.rows.half_norm[row + r];
      const Vec<T> value = both - load(tile + r * NR + v * W);
      close |= bits_lt(value, both * T(kCloseShare));
      store(tile + r * NR + v * W, value);
    }
  }
  if (!close) return false;
  alignas(64) T exact[NR * NR];
  const int64_t depth = m.rows.depth;
  tile_differences(m.rows.panels + row * depth, m.columns.panels + column * depth, depth, exact);
  for (int r = 0; r < NR; ++r) {
    for (int v = 0; v < kMicroVectors; ++v) {
      const Vec<T> both = load(m.columns.half_norm + column + v * W) + m.rows.half_norm[row + r];
      const Vec<T> value = load(tile + r * NR + v * W);
      store(tile + r * NR + v * W, value < both * T(kCloseShare) ? load(exact + r * NR + v * W) : value);
    }
  }
  return true;
}

// Replaces |a - b|^2 / 2 by the distance, kFar where it is infinite.
template <class T>
inline void distances(T* tile, Distance distance) {
  constexpr int W = kLanes<T>, NR = kPanelRows<T>;
  const Vec<T> far = broadcast(kFar<T>);
  for (int i = 0; i < NR * NR; i += W) {
    Vec<T> value = load(tile + i);
    if (distance != Distance::cosine) value = value + value;
    if (distance == Distance::euclidean) value = square_root(value);
    store(tile + i, value < far ? value : far);
  }
}

// Sets pairs of one label to `value`, in row r of a tile.
template <class T>
DEEPSIM_INLINE void mask_positives(const TileBlock<T>& m, int64_t row, int64_t column, T* tile, T value) {
  constexpr int64_t NR = kPanelRows<T>;
  for (int64_t r = 0; r < NR && row + r < m.row_count; ++r) {
    const int64_t begin = m.positive_begin[row + r] - column, end = m.positive_end[row + r] - column;
    for (int64_t c = begin < 0 ? 0 : begin; c < (end < NR ? end : NR); ++c) tile[r * NR + c] = value;
  }
}

// The distances of every row's positives, in the order of the columns, itself left out: element s of row p's list at
// lists[list_begin[panel of p] + s * kPanelRows + p % kPanelRows]. Rows of the panels [begin, end).
template <class T>
void positive_distances(const TileBlock<T>& m, Distance distance, const int64_t* list_begin, T* lists) {
  constexpr int64_t NR = kPanelRows<T>;
  alignas(64) T tile[NR * NR];
  const int64_t depth = m.rows.depth;
  for (int64_t i = m.row_begin; i < m.row_end; ++i) {
    const int64_t row = i * NR, last_row = (row + NR < m.row_count ? row + NR : m.row_count) - 1;
    for (int64_t j = m.positive_begin[row] / NR; j * NR < m.positive_end[last_row]; ++j) {
      const int64_t column = j * NR;
      tile_product(m.rows.panels + row * depth, m.columns.panels + column * depth, depth, tile, false);
      half_squares(m, tile, row, column);
      distances(tile, distance);
      for (int64_t r = 0; row + r <= last_row; ++r) {
        const int64_t begin = m.positive_begin[row + r], end = m.positive_end[row + r];
        for (int64_t c = begin > column ? begin : column; c < (end < column + NR ? end : column + NR); ++c) {
          if (m.symmetric && c == row + r) continue;
          const int64_t slot = c - begin - (m.symmetric && c > row + r);
          lists[list_begin[i] + slot * NR + r] = tile[r * NR + c - column];
        }
      }
    }
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
