// The walk over the tiles of one rectangle of panels: what every loss of all pairs has in common. A loss is what it does with a tile.
#pragma once

#include "../kernels.h"
#include "tile_product.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

// Calls reduce(tile, row, column, mixed, both) for every tile of products, [kPanelRows][kPanelRows] in L1, which it may overwrite.
//   row, column: packed positions of the tile's first row and column
//   mixed: some pair of the tile may share a label; otherwise none does
//   both: the tile stands for its mirror image as well, which is not computed. A tile on the diagonal holds both halves.
template <class T, class Reduce>
DEEPSIM_INLINE void walk_tiles(const TileBlock<T>& m, Reduce reduce) {
  constexpr int64_t NR = kPanelRows<T>;
  alignas(64) T tile[NR * NR];
  const int64_t depth = m.rows.depth, panel = depth * NR;
  for (int64_t i = m.row_begin; i < m.row_end; ++i) {
    const int64_t row = i * NR, last_row = (row + NR < m.row_count ? row + NR : m.row_count) - 1;
    for (int64_t j = m.symmetric && m.column_begin < i ? i : m.column_begin; j < m.column_end; ++j) {
      const int64_t column = j * NR;
      tile_product(m.rows.panels + i * panel, m.columns.panels + j * panel, depth, tile, false);
      // Ranges ascend with the row, so these two ends bound every row's positives.
      const bool mixed = m.positive_begin[row] < column + NR && column < m.positive_end[last_row];
      reduce(tile, row, column, mixed, m.symmetric && i != j);
    }
  }
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
