// The positives of every packed row as lists of distances: measured from the packed rows, or given with the call.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "../common/stage.h"
#include "packed_pairs.h"

namespace deepsim::cpu {

// Lists as kernels.h describes them: in the order of the columns or of the call, or sorted.
template <class T>
struct PositiveLists {
  std::vector<int32_t> length;  // by packed row, filled up to whole panels
  std::vector<T> count;         // the same, as kernels read it
  std::vector<int64_t> begin;   // [panels + 1]
  std::vector<T> distance;
  int64_t panel_rows;

  // Nothing but filling yet. length(p) is that of packed row p's list; each panel's lists are `narrowest` wide at least.
  template <class Length>
  PositiveLists(const PackedPairs<T>& pairs, int64_t narrowest, Length length_of)
      : length(pairs.rows.panels * pairs.panel_rows), begin(pairs.rows.panels + 1), panel_rows(pairs.panel_rows) {
    for (int64_t p = 0; p < pairs.rows.count; ++p) length[p] = int32_t(length_of(p));
    count.assign(length.begin(), length.end());
    for (int64_t i = 0; i < pairs.rows.panels; ++i) {
      const auto first = length.begin() + i * panel_rows;
      const int64_t longest = *std::max_element(first, first + panel_rows);
      begin[i + 1] = begin[i] + std::max(longest, narrowest) * panel_rows;
    }
    distance.assign(begin.back(), -std::numeric_limits<T>::infinity());
  }

  int64_t width(int64_t panel) const { return (begin[panel + 1] - begin[panel]) / panel_rows; }
  // Of row p's s-th element.
  int64_t at(int64_t p, int64_t s) const { return begin[p / panel_rows] + s * panel_rows + p % panel_rows; }
};

// Of the columns with the row's label, in their order.
template <class T>
PositiveLists<T> positive_lists(const Kernels<T>& kernels, const PackedPairs<T>& pairs, Distance distance) {
  const Stage stage("positives");
  PositiveLists<T> lists(pairs, 0, [&](int64_t p) { return pairs.positive_count(p); });
  at::parallel_for(0, pairs.rows.panels, 1, [&](int64_t begin, int64_t end) {
    kernels.positive_distances(pairs.tiles(begin, end, 0, 0), distance, lists.begin.data(), lists.distance.data());
  });
  return lists;
}

inline Center given_center(const OptionalTensor& center) {
  return {Center::both, center ? OptionalTensor(center->contiguous()) : std::nullopt};
}

// Those of the call: of row a of the input, elements [begin[a], begin[a + 1]) of `distances`; as check_given_lists leaves them, contiguous.
template <class T>
PositiveLists<T> given_lists(const PackedPairs<T>& pairs, int64_t narrowest, const at::Tensor& begin, const at::Tensor& distances) {
  const int64_t* first = begin.const_data_ptr<int64_t>();
  const T* distance = distances.const_data_ptr<T>();
  const auto row = [&](int64_t p) { return pairs.rows.original[p]; };
  PositiveLists<T> lists(pairs, narrowest, [&](int64_t p) { return first[row(p) + 1] - first[row(p)]; });
  at::parallel_for(0, pairs.rows.count, 1024, [&](int64_t from, int64_t to) {
    for (int64_t p = from; p < to; ++p)
      for (int32_t s = 0; s < lists.length[p]; ++s) lists.distance[lists.at(p, s)] = distance[first[row(p)] + s];
  });
  return lists;
}

// The column of row p's s-th positive, in the order of the columns.
template <class T>
int64_t positive_column(const PackedPairs<T>& pairs, int64_t p, int64_t s) {
  const int64_t column = pairs.positives.begin[p] + s;
  return column + (pairs.symmetric && column >= p);
}

// Sorts every list, the farthest positive first; returns where each element was.
template <class T>
std::vector<int32_t> sort_descending(PositiveLists<T>& lists) {
  std::vector<int32_t> slot(lists.distance.size());
  at::parallel_for(0, int64_t(lists.length.size()), 64, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<T, int32_t>> row;
    for (int64_t p = begin; p < end; ++p) {
      row.clear();
      for (int32_t s = 0; s < lists.length[p]; ++s) row.emplace_back(-lists.distance[lists.at(p, s)], s);
      std::sort(row.begin(), row.end());
      for (int64_t s = 0; s < int64_t(row.size()); ++s) {
        lists.distance[lists.at(p, s)] = -row[s].first;
        slot[lists.at(p, s)] = row[s].second;
      }
    }
  });
  return slot;
}

}  // namespace deepsim::cpu
