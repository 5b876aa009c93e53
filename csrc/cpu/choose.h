// A negative, or a positive, for every anchor by distances that differences have measured where the tiles' product could not: what is
// left is the rounding of the packed rows themselves.
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

// Limits for every packed row: one that every distance is beyond, or none is.
template <class T>
std::vector<T> below_all(const PackedPairs<T>& pairs) {
  return std::vector<T>(pairs.rows.panels * pairs.panel_rows, T(-1));
}
template <class T>
std::vector<T> above_all(const PackedPairs<T>& pairs) {
  return std::vector<T>(pairs.rows.panels * pairs.panel_rows, std::numeric_limits<T>::max());
}

// The farthest negative, or the nearest of those farther than `limit`. walk(search) calls search(tiles) for the tiles to be looked at.
template <class T, class Walk>
Chosen<T> choose_negatives_of(const Kernels<T>& kernels, const PackedPairs<T>& pairs, bool farthest, const std::vector<T>& limit,
                              Distance distance, Walk walk) {
  // To the semi-hard search the limits are lists of one positive each.
  std::vector<int64_t> begin;
  for (int64_t i = 0; i <= pairs.rows.panels; ++i) begin.push_back(i * pairs.panel_rows);
  // Starts out as what everything betters in the one search, and nothing in the other, which then costs next to nothing.
  const T worst = farthest ? T(-1) : std::numeric_limits<T>::max();
  Chosen<T> near{std::vector<T>(limit.size(), worst), std::vector<int32_t>(limit.size(), kNobody)}, far = near;
  const SemiHardLists<T> lists{begin.data(),      limit.data(),        near.distance.data(),
                               near.index.data(), far.distance.data(), far.index.data()};
  walk([&](const TileBlock<T>& tiles) { kernels.semi_hard({tiles, lists, lists, distance}); });
  return farthest ? far : near;
}

// The same, of all pairs.
template <class T>
Chosen<T> choose_negatives(const Kernels<T>& kernels, const PackedPairs<T>& pairs, bool farthest, const std::vector<T>& limit,
                           Distance distance) {
  return choose_negatives_of(kernels, pairs, farthest, limit, distance,
                             [&](auto search) { over_squares(pairs, all_panels(pairs), search); });
}

}  // namespace deepsim::cpu
