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

// Panels of anchors whose lists are held at a time.
struct Stripe {
  int64_t begin, end;
};

// Elements of lists that are held at a time, or those of one panel, if it has more. Losses need up to 32 bytes for each, 44 in float64.
inline constexpr int64_t kMostListed = int64_t(1) << 21;

// All anchors. Mostly one stripe; classes of very many rows take several.
template <class T>
std::vector<Stripe> stripes_of(const PackedPairs<T>& pairs) {
  std::vector<Stripe> stripes;
  int64_t listed = 0;
  for (int64_t i = 0; i < pairs.rows.panels; ++i) {
    int64_t longest = 0;
    for (int64_t p = i * pairs.panel_rows; p < std::min((i + 1) * pairs.panel_rows, pairs.rows.count); ++p)
      longest = std::max(longest, pairs.positive_count(p));
    const int64_t elements = longest * pairs.panel_rows;
    if (stripes.empty() || listed + elements > kMostListed) {
      stripes.push_back({i, i});
      listed = 0;
    }
    stripes.back().end = i + 1;
    listed += elements;
  }
  return stripes;
}

template <class T>
Stripe all_panels(const PackedPairs<T>& pairs) {
  return {0, pairs.rows.panels};
}

template <class T>
bool is_all(const PackedPairs<T>& pairs, const Stripe& stripe) {
  return stripe.begin == 0 && stripe.end == pairs.rows.panels;
}

// Packed positions of a stripe's rows.
template <class T>
std::pair<int64_t, int64_t> row_range(const PackedPairs<T>& pairs, const Stripe& stripe) {
  return {stripe.begin * pairs.panel_rows, std::min(stripe.end * pairs.panel_rows, pairs.rows.count)};
}

// Lists as kernels.h describes them: in the order of the columns or of the call, or sorted. Rows of other stripes have empty ones.
template <class T>
struct PositiveLists {
  Stripe stripe;
  std::vector<int32_t> length;  // by packed row, filled up to whole panels
  std::vector<T> count;         // the same, as kernels read it
  std::vector<int64_t> begin;   // [panels + 1]
  std::vector<T> distance;
  int64_t panel_rows;

  // Nothing but filling yet. length(p) is that of packed row p's list; each panel's lists are `narrowest` wide at least.
  template <class Length>
  PositiveLists(const PackedPairs<T>& pairs, const Stripe& of, int64_t narrowest, Length length_of)
      : stripe(of), length(pairs.rows.panels * pairs.panel_rows), begin(pairs.rows.panels + 1), panel_rows(pairs.panel_rows) {
    const auto [first_row, last_row] = row_range(pairs, stripe);
    for (int64_t p = first_row; p < last_row; ++p) length[p] = int32_t(length_of(p));
    count.assign(length.begin(), length.end());
    for (int64_t i = 0; i < pairs.rows.panels; ++i) {
      const auto first = length.begin() + i * panel_rows;
      const int64_t longest = std::max<int64_t>(*std::max_element(first, first + panel_rows), narrowest);
      begin[i + 1] = begin[i] + (i >= stripe.begin && i < stripe.end ? longest * panel_rows : 0);
    }
    distance.assign(begin.back(), -std::numeric_limits<T>::infinity());
  }

  int64_t width(int64_t panel) const { return (begin[panel + 1] - begin[panel]) / panel_rows; }
  // Of row p's s-th element.
  int64_t at(int64_t p, int64_t s) const { return begin[p / panel_rows] + s * panel_rows + p % panel_rows; }
};

// Of the columns with the row's label, in their order.
template <class T>
PositiveLists<T> positive_lists(const Kernels<T>& kernels, const PackedPairs<T>& pairs, const Stripe& stripe, Distance distance) {
  const Stage stage("positives");
  PositiveLists<T> lists(pairs, stripe, 0, [&](int64_t p) { return pairs.positive_count(p); });
  at::parallel_for(stripe.begin, stripe.end, 1, [&](int64_t begin, int64_t end) {
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
  PositiveLists<T> lists(pairs, all_panels(pairs), narrowest, [&](int64_t p) { return first[row(p) + 1] - first[row(p)]; });
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

// Which of row p's positives the column c is.
template <class T>
int64_t positive_slot(const PackedPairs<T>& pairs, int64_t p, int64_t c) {
  return c - pairs.positives.begin[p] - (pairs.symmetric && c > p);
}

// Sorts every list, the farthest positive first; returns where each element was.
template <class T>
std::vector<int32_t> sort_descending(PositiveLists<T>& lists) {
  std::vector<int32_t> slot(lists.distance.size());
  const int64_t rows = lists.panel_rows;
  at::parallel_for(lists.stripe.begin * rows, lists.stripe.end * rows, 64, [&](int64_t begin, int64_t end) {
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
