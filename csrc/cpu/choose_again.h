// Anchors whose choice by tiles is not to be relied on choose again, a panel of them at a time, by differences of the packed rows.
#pragma once

#include "../common/choose_again.h"
#include "../common/stage.h"
#include "choose.h"

namespace deepsim::cpu {

// The choice of each packed row: |a - b|^2 / 2 as its tile had it, and whom.
template <class T>
struct Choices {
  const std::vector<T>& half_square;
  std::vector<int32_t>& index;

  bool are_lost(const PackedPairs<T>& pairs, int64_t p) const {
    return index[p] != kNobody && has_lost_digits(half_square[p], pairs.rows.half_norm[p]);
  }
};

template <class T>
std::vector<int64_t> panels_of_lost(const PackedPairs<T>& pairs, const Choices<T>& choices) {
  std::vector<int64_t> panels;
  for (int64_t p = 0; p < pairs.rows.count; ++p) {
    const int64_t panel = p / pairs.panel_rows;
    if (choices.are_lost(pairs, p) && (panels.empty() || panels.back() != panel)) panels.push_back(panel);
  }
  return panels;
}

template <class T>
void choose_positives_again(const Kernels<T>& kernels, const PackedPairs<T>& pairs, Distance distance, const Choices<T>& positives) {
  const Stage stage("choose again");
  const std::vector<int64_t> panels = panels_of_lost(pairs, positives);
  const int64_t width = pairs.panel_rows;
  const std::vector<int64_t> list_begin(pairs.rows.panels);  // 0: the buffer is one panel's
  at::parallel_for(0, int64_t(panels.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> lists;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = panels[k] * width, last = std::min(first + width, pairs.rows.count);
      int64_t longest = 0;
      for (int64_t p = first; p < last; ++p) longest = std::max(longest, pairs.positive_count(p));
      lists.resize(longest * width);
      kernels.positive_distances(pairs.tiles(panels[k], panels[k] + 1, 0, 0), distance, list_begin.data(), lists.data());
      for (int64_t p = first; p < last; ++p) {
        if (!positives.are_lost(pairs, p)) continue;
        // In the order of the columns, which for one label is that of the input: the first of equals has the lowest index.
        const T* list = lists.data() + (p - first);
        int64_t farthest = 0;
        for (int64_t s = 1; s < pairs.positive_count(p); ++s)
          if (list[s * width] > list[farthest * width]) farthest = s;
        positives.index[p] = pairs.columns().original[positive_column(pairs, p, farthest)];
      }
    }
  });
}

template <class T>
void choose_negatives_again(const Kernels<T>& kernels, const PackedPairs<T>& pairs, Distance distance, const Choices<T>& negatives) {
  const Stage stage("choose again");
  const std::vector<int64_t> panels = panels_of_lost(pairs, negatives);
  if (panels.empty()) return;
  // The others of a panel look for nobody.
  std::vector<T> limit = above_all(pairs);
  for (int64_t p = 0; p < pairs.rows.count; ++p)
    if (negatives.are_lost(pairs, p)) limit[p] = T(-1);
  const Chosen<T> chosen = choose_negatives_of(kernels, pairs, false, limit, distance, [&](auto search) {
    at::parallel_for(0, int64_t(panels.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        TileBlock<T> tiles = pairs.tiles(panels[k], panels[k] + 1, 0, pairs.columns().panels);
        tiles.symmetric = false;  // the columns before the rows' own as well, and nothing for the columns
        search(tiles);
      }
    });
  });
  for (int64_t p = 0; p < pairs.rows.count; ++p)
    if (limit[p] < 0) negatives.index[p] = chosen.index[p];
}

}  // namespace deepsim::cpu
