// A positive and a negative for every anchor by distances that are right to rounding, close pairs included.
#pragma once

#include <limits>
#include <vector>

#include "all_pairs.h"

namespace deepsim::cpu {

// Of each packed row, filling included.
template <class T>
struct Chosen {
  std::vector<T> distance;
  std::vector<int32_t> index;  // row of the input, kNobody where there is none: the distance then means nothing
};

// Limits that every distance is beyond.
template <class T>
std::vector<T> below_all(const PackedPairs<T>& pairs) {
  return std::vector<T>(pairs.rows.panels * pairs.panel_rows, T(-1));
}

// The farthest negative, or the nearest of those farther than `limit`.
template <class T>
Chosen<T> choose_negatives(const Kernels<T>& kernels, const PackedPairs<T>& pairs, bool farthest, const std::vector<T>& limit,
                           Distance distance) {
  // To the semi-hard search the limits are lists of one positive each.
  std::vector<int64_t> begin;
  for (int64_t i = 0; i <= pairs.rows.panels; ++i) begin.push_back(i * pairs.panel_rows);
  // Starts out as what everything betters in the one search, and nothing in the other, which then costs next to nothing.
  const T worst = farthest ? T(-1) : std::numeric_limits<T>::max();
  Chosen<T> near{std::vector<T>(limit.size(), worst), std::vector<int32_t>(limit.size(), kNobody)}, far = near;
  const SemiHardLists<T> lists{begin.data(),      limit.data(),        near.distance.data(),
                               near.index.data(), far.distance.data(), far.index.data()};
  struct Nothing {};
  over_squares<Nothing>(pairs, [&](const TileBlock<T>& tiles, Nothing&) { kernels.semi_hard({tiles, lists, lists, distance}); });
  return farthest ? far : near;
}

}  // namespace deepsim::cpu
