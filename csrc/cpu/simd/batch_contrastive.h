// Contrastive loss of all pairs: what a tile of negatives adds to it.
#pragma once

#include "batch_all.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class T>
void contrastive_negatives(const ContrastiveBlock<T>& b, ContrastiveSums& sums) {
  constexpr int64_t W = kLanes<T>, NR = kPanelRows<T>;
  walk_tiles(b.tiles, [&](T* distance, int64_t row, int64_t column, bool mixed, bool both) {
    const bool close = half_squares(b.tiles, distance, row, column);
    distances(distance, b.distance);
    if (mixed) mask_positives(b.tiles, row, column, distance, kFar<T>);

    // A tile that stands for its mirror image as well has every ordered pair twice.
    const T ordered = both ? T(2) : T(1);
    alignas(64) T weight[NR * NR];
    Vec<T> loss = {}, active = {}, sum = {};
    const Vec<T> far = broadcast(kFar<T>), none = {};
    for (int64_t i = 0; i < NR * NR; i += W) {
      const Vec<T> d = load(distance + i), within = b.margin - d;
      count_lt(active, none, within);
      const Vec<T> l = within > T(0) ? within : none;
      loss += b.squared ? l * l : l;
      sum += d < far ? d : none;
      store(weight + i, within > T(0) ? (b.squared ? l * (T(-2) * ordered) : broadcast(-ordered)) : none);
    }
    const double found = lane_sum<T>(active);
    sums.active += int64_t(found * double(ordered));
    sums.loss += lane_sum<T>(loss) * double(ordered);
    sums.distance += lane_sum<T>(sum) * double(ordered);
    if (found == 0 || b.row_gradient == nullptr) return;
    strengths(weight, distance, b.distance);
    pull_tile(b.tiles, row, column, weight, b.tiles.symmetric && !both, close, b.row_gradient, b.column_gradient);
  });
}

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
