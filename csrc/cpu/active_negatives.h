// The count of batch-all: how many negatives every positive is active with, what they add to the loss, and how they pull the rows.
#pragma once

#include <vector>

#include "pair_gradient.h"

namespace deepsim::cpu {

// Adds up `active` where it was noted at the ends of runs, and puts lists and counts back into the order in which they came.
template <class T>
void restore_order(const std::vector<int32_t>& slot, PositiveLists<T>& lists, std::vector<T>& active) {
  const int64_t rows = lists.panel_rows;
  at::parallel_for(lists.stripe.begin * rows, lists.stripe.end * rows, 64, [&](int64_t begin, int64_t end) {
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

// By element of the lists, which come and go in an order of their own. What the negatives add to the loss is added to `sums`, not finite
// where distances have not fitted into T, and how they pull the rows to `gathered`: the gradient of minus the sum of d_an over active
// triplets.
template <class T>
std::vector<T> active_negatives(const Kernels<T>& kernels, const PackedPairs<T>& pairs, PositiveLists<T>& lists, double margin,
                                bool semi_hard, Distance distance, BatchAllSums& sums, const GatheredGradient<T>& gathered) {
  const std::vector<int32_t> slot = sort_descending(lists);
  std::vector<T> active(lists.distance.size());
  const SortedPositives<T> positives{lists.begin.data(), lists.distance.data(), active.data(), lists.count.data()};
  for (const BatchAllSums& s : over_squares<BatchAllSums>(pairs, lists.stripe, [&](const TileBlock<T>& tiles, BatchAllSums& sum) {
         kernels.batch_all({tiles, positives, positives, comparable_margin<T>(margin), semi_hard, distance, gathered.row_data(),
                            gathered.column_data()},
                           sum);
       })) {
    sums.active += s.active;
    sums.triplets += s.triplets;
    sums.active_d_an += s.active_d_an;
    sums.d_an += s.d_an;
  }
  restore_order(slot, lists, active);
  return active;
}

}  // namespace deepsim::cpu
