// All pairs of a batch, or of a batch and a reference set, made ready for the tiles: rows sorted by label, centred and packed.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "rows.h"

namespace deepsim::cpu {

using OptionalTensor = std::optional<at::Tensor>;

// The index of no row.
inline constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();

struct SortedLabels {
  std::vector<int32_t> order;   // packed position -> row; rows of one label adjacent and in their order
  std::vector<int64_t> labels;  // by packed position
};

// Class numbers are counted; labels that lie far apart are left to torch's sort.
SortedLabels sort_labels(const at::Tensor& labels);

// Rows of one side with the label of each row of the other: [begin, end), both by packed position.
struct PositiveRanges {
  std::vector<int32_t> begin, end;
};

// Packed rows and the buffers they stand in.
template <class T>
struct PackedPoints {
  int64_t count = 0, panels = 0;
  std::vector<double> norm;  // |row| by row of the input, for cosine only
  at::Tensor panel_buffer;
  std::vector<T> half_norm;
  std::vector<int32_t> original;
  PackedRows<T> view;
};

template <class T>
struct PackedPairs {
  PackedPoints<T> rows, references;  // references only where there is a reference set
  PositiveRanges positives, anchors;  // of rows, and of the references
  int64_t panel_rows;
  bool symmetric;  // rows against themselves
  bool finite;     // false: a NaN or inf somewhere, or rows so long that |a - b|^2 / 2 could overflow

  const PackedPoints<T>& columns() const { return symmetric ? rows : references; }

  TileBlock<T> tiles(int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) const {
    return {rows.view, columns().view, positives.begin.data(), positives.end.data(), rows.count,
            row_begin, row_end,        column_begin,           column_end,           symmetric};
  }

  // Rows with the label of each column.
  const PositiveRanges& anchors_of_columns() const { return symmetric ? positives : anchors; }

  // Columns of the label of packed row p, itself left out.
  int64_t positive_count(int64_t p) const { return positives.end[p] - positives.begin[p] - symmetric; }
  int64_t negative_count(int64_t p) const { return columns().count - (positives.end[p] - positives.begin[p]); }
};

// What the rows of both sides are shifted by: the mean of both; that of the references alone, so that no anchor matters to the others;
// or what the caller says, so that many sets see the same distances, to the bit.
struct Center {
  enum About { both, references } about = both;
  OptionalTensor given;  // float64 [D], for cosine distance 0 where any of the many sets has a zero row
};

// Elements of a row of x and ref must be adjacent. The half squared distance of packed rows is that of the input's rows or, for cosine
// distance, of their unit vectors: the cosine distance itself.
template <class T>
PackedPairs<T> pack_pairs(const Kernels<T>& kernels, const at::Tensor& x, const SortedLabels& sorted, const OptionalTensor& ref,
                          const SortedLabels& ref_sorted, Distance distance, const Center& about = {});

// The same from labels; ref and ref_labels are given together or not at all.
template <class T>
PackedPairs<T> pack_pairs(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
                          const OptionalTensor& ref_labels, Distance distance, const Center& about = {});

}  // namespace deepsim::cpu
