// The search of semi-hard mining: for every positive the nearest negative that is farther, for every anchor its farthest negative.
#pragma once

#include <limits>
#include <vector>

#include "all_pairs.h"

namespace deepsim::cpu {

template <class T>
struct FartherNegatives {
  // By element of the lists; the largest number and kNobody where no negative is farther.
  std::vector<T> nearest;
  std::vector<int32_t> nearest_index;
  // By packed row; -1 and kNobody where there is no negative, or where the panel's lists are empty.
  std::vector<T> farthest;
  std::vector<int32_t> farthest_index;

  bool has_nearest(int64_t at) const { return nearest_index[at] != kNobody; }
  bool has_farthest(int64_t p) const { return farthest_index[p] != kNobody; }
};

// `lists` are sorted.
template <class T>
FartherNegatives<T> farther_negatives(const Kernels<T>& kernels, const PackedPairs<T>& pairs, const PositiveLists<T>& lists,
                                      Distance distance) {
  const size_t elements = lists.distance.size(), rows = lists.length.size();
  FartherNegatives<T> found{std::vector<T>(elements, std::numeric_limits<T>::max()), std::vector<int32_t>(elements, kNobody),
                            std::vector<T>(rows, T(-1)), std::vector<int32_t>(rows, kNobody)};
  const SemiHardLists<T> view{lists.begin.data(),         lists.distance.data(), found.nearest.data(),
                              found.nearest_index.data(), found.farthest.data(), found.farthest_index.data()};
  over_squares(pairs, lists.stripe, [&](const TileBlock<T>& tiles) { kernels.semi_hard({tiles, view, view, distance}); });

  // In long lists an entry stands for those after it as well, which are not as far.
  at::parallel_for(lists.stripe.begin * lists.panel_rows, lists.stripe.end * lists.panel_rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int32_t s = 1; s < lists.length[p]; ++s) {
        const int64_t at = lists.at(p, s), before = lists.at(p, s - 1);
        const bool nearer = found.nearest[before] < found.nearest[at];
        const bool lower = found.nearest[before] == found.nearest[at] && found.nearest_index[before] < found.nearest_index[at];
        if (!nearer && !lower) continue;
        found.nearest[at] = found.nearest[before];
        found.nearest_index[at] = found.nearest_index[before];
      }
    }
  });
  return found;
}

}  // namespace deepsim::cpu
