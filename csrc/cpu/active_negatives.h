// The count of batch-all: how many negatives every positive is active with, what they add to the loss, and how they pull the rows.
#pragma once

#include <vector>

#include "all_pairs.h"

namespace deepsim::cpu {

template <class T>
struct ActiveNegatives {
  BatchAllSums sums;
  std::vector<T> active;        // by element of the lists
  GatheredGradient<T> gathered;  // of minus the sum of d_an over active triplets
};

// Adds up `active` where it was noted at the ends of runs, and puts lists and counts back into the order in which they came.
template <class T>
void restore_order(const std::vector<int32_t>& slot, PositiveLists<T>& lists, std::vector<T>& active) {
  at::parallel_for(0, int64_t(lists.length.size()), 64, [&](int64_t begin, int64_t end) {
    std::vector<T> distance, count;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = lists.length[p];
      if (lists.width(p / lists.panel_rows) > kScannedPositives)
        for (int64_t s = n - 2; s >= 0; --s) active[lists.at(p, s)] += active[lists.at(p, s + 1)];
      distance.resize(n);
      count.resize(n);
      for (int64_t s = 0; s < n; ++s) {
        distance[slot[lists.at(p, s)]] = lists.distance[lists.at(p, s)];
        count[slot[lists.at(p, s)]] = active[lists.at(p, s)];
      }
      for (int64_t s = 0; s < n; ++s) {
        lists.distance[lists.at(p, s)] = distance[s];
        active[lists.at(p, s)] = count[s];
      }
    }
  });
}

// `lists` come and go in an order of their own. The sums are not finite where distances have not fitted into T.
template <class T>
ActiveNegatives<T> active_negatives(const Kernels<T>& kernels, const PackedPairs<T>& pairs, PositiveLists<T>& lists, double margin,
                                    bool semi_hard, Distance distance, bool with_gradient) {
  const std::vector<int32_t> slot = sort_descending(lists);
  ActiveNegatives<T> found{{}, std::vector<T>(lists.distance.size()), with_gradient ? GatheredGradient<T>(pairs) : GatheredGradient<T>()};
  const SortedPositives<T> positives{lists.begin.data(), lists.distance.data(), found.active.data(), lists.count.data()};
  for (const BatchAllSums& s : over_squares<BatchAllSums>(pairs, [&](const TileBlock<T>& tiles, BatchAllSums& sum) {
         kernels.batch_all({tiles, positives, positives, comparable_margin<T>(margin), semi_hard, distance,
                            found.gathered.row_data(), found.gathered.column_data()},
                           sum);
       })) {
    found.sums.active += s.active;
    found.sums.triplets += s.triplets;
    found.sums.active_d_an += s.active_d_an;
    found.sums.d_an += s.d_an;
  }
  restore_order(slot, lists, found.active);
  return found;
}

}  // namespace deepsim::cpu
