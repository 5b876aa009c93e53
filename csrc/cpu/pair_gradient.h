// How gradients of losses over pairs come together on the CPU: from pairs that are listed row by row, and from what tiles gather.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zero.h>

#include <algorithm>
#include <vector>

#include "all_pairs.h"
#include "huge_pages.h"

namespace deepsim::cpu {

template <class T>
using RowPairs = std::vector<ListedPair<T>>;

// Adds to the gradient `grad`, [rows][depth], that of the pairs of every row at the positions [begin, end). list(p, pairs) appends those
// of the row at position p, which is row original[p].
template <class T, class List>
void add_pairs(const Kernels<T>& kernels, const PairSides& sides, const int32_t* original, int64_t begin, int64_t end, List list, T* grad) {
  at::parallel_for(begin, end, row_grain(sides.rows.depth), [&](int64_t from, int64_t to) {
    RowPairs<T> pairs;
    for (int64_t p = from; p < to; ++p) {
      pairs.clear();
      list(p, pairs);
      kernels.pair_gradient(sides, original[p], pairs.data(), int64_t(pairs.size()), grad + original[p] * sides.rows.depth);
    }
  });
}

// Pairs that weigh nothing, which may be most, are left out.
template <class T>
void append(RowPairs<T>& pairs, int32_t other, T distance, T weight) {
  if (weight != 0) pairs.push_back({other, distance, weight});
}

// The elements of a list by the row that each is of, in their order.
struct ByRow {
  std::vector<int64_t> begin;  // [rows + 1]
  std::vector<int64_t> element;

  template <class RowOf>
  ByRow(int64_t rows, int64_t elements, RowOf row_of) : begin(rows + 1), element(elements) {
    for (int64_t t = 0; t < elements; ++t) ++begin[row_of(t) + 1];
    for (int64_t i = 0; i < rows; ++i) begin[i + 1] += begin[i];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t t = 0; t < elements; ++t) element[next[row_of(t)]++] = t;
  }
};

// The gradient that tiles gather, by packed row and column; undefined where none is wanted.
template <class T>
struct GatheredGradient {
  at::Tensor rows, columns;

  GatheredGradient() = default;
  // symmetric: tiles stand for their mirror images.
  GatheredGradient(const PackedPairs<T>& pairs, bool symmetric, Wanted wanted) {
    if (!wanted.gradient) return;
    rows = none_yet(pairs, pairs.rows);
    if (symmetric) columns = rows;
    if (!symmetric && (pairs.symmetric || wanted.of_references)) columns = none_yet(pairs, pairs.columns());
  }

  T* row_data() const { return rows.defined() ? rows.template mutable_data_ptr<T>() : nullptr; }
  T* column_data() const { return columns.defined() ? columns.template mutable_data_ptr<T>() : nullptr; }

 private:
  static at::Tensor none_yet(const PackedPairs<T>& pairs, const PackedPoints<T>& points) {
    const int64_t elements = points.panels * pairs.panel_rows * gathered_depth(points.view.depth);
    return in_huge_pages(at::empty({elements}, points.panel_buffer.options())).zero_();
  }
};

// The gradients of both sides, [rows][depth] in the type of the arithmetic, as they come together; in the self form one and the same.
// Undefined where they are not wanted: then nothing is added to them.
template <class T>
class PairGradients {
 public:
  PairGradients(const Kernels<T>& kernels, const PackedPairs<T>& pairs, const at::Tensor& x, const OptionalTensor& ref, Distance distance,
                Wanted wanted)
      : kernels_(kernels), pairs_(pairs), row_scale_(inverse(pairs.rows.norm)), column_scale_(inverse(pairs.columns().norm)),
        of_rows_{cpu::rows_of(x), cpu::rows_of(ref ? *ref : x), data(row_scale_), data(column_scale_), distance},
        of_columns_{of_rows_.others, of_rows_.rows, of_rows_.other_scale, of_rows_.row_scale, distance},
        grad_(wanted.gradient ? none_yet(x) : at::Tensor()),
        grad_ref_(!ref ? grad_ : wanted.gradient && wanted.of_references ? none_yet(*ref) : at::Tensor()) {}

  bool wants_rows() const { return grad_.defined(); }
  bool wants_columns() const { return grad_ref_.defined(); }

  // Pairs of a stripe's anchors with their positives: distance(p, s) and weight(p, s) are those of packed row p and its s-th positive.
  // same_weight: it is that of the mirror image as well.
  template <class DistanceOf, class WeightOf>
  void add_positives(const Stripe& stripe, DistanceOf distance, WeightOf weight, bool same_weight) {
    if (!wants_rows()) return;
    const Stage stage("gradient");
    const auto [first, last] = row_range(pairs_, stripe);
    // In the self form a row is an anchor and a positive of the same rows: where the other weight is known, both pairs are one.
    const bool at_once = pairs_.symmetric && (same_weight || is_all(pairs_, stripe));
    add_to_rows(first, last, [&](int64_t p, RowPairs<T>& row) {
      for (int64_t s = 0; s < pairs_.positive_count(p); ++s) {
        const int64_t c = positive_column(pairs_, p, s);
        T total = weight(p, s);
        if (at_once) total += same_weight ? total : weight(c, positive_slot(pairs_, c, p));
        append(row, pairs_.columns().original[c], distance(p, s), total);
      }
    });
    if (at_once || first == last || !wants_columns()) return;
    const PositiveRanges& anchors = pairs_.anchors_of_columns();
    const auto list = [&, first = first, last = last](int64_t c, RowPairs<T>& column) {
      for (int64_t p = std::max<int64_t>(first, anchors.begin[c]); p < std::min<int64_t>(last, anchors.end[c]); ++p) {
        if (pairs_.symmetric && p == c) continue;
        const int64_t s = positive_slot(pairs_, p, c);
        append(column, pairs_.rows.original[p], distance(p, s), weight(p, s));
      }
    };
    add_to_columns(pairs_.positives.begin[first], pairs_.positives.end[last - 1], list);
  }

  // Other pairs of the packed rows [begin, end), of a side whose gradient is wanted: list(p, pairs) adds those of row p.
  template <class List>
  void add_to_rows(int64_t begin, int64_t end, List list) {
    add_pairs(kernels_, of_rows_, pairs_.rows.original.data(), begin, end, list, grad_.template mutable_data_ptr<T>());
  }
  template <class List>
  void add_to_columns(int64_t begin, int64_t end, List list) {
    add_pairs(kernels_, of_columns_, pairs_.columns().original.data(), begin, end, list, grad_ref_.template mutable_data_ptr<T>());
  }

  // The gradients by the rows and by the columns, the latter only of a reference set: `factor` times that of the pairs so far, and
  // `gathered_factor` times what tiles have gathered, which is used up.
  void finish(T factor, const GatheredGradient<T>& gathered, T gathered_factor, at::Tensor& grad, at::Tensor& grad_ref) {
    if (!wants_rows()) return;
    const Stage stage("gradient");
    if (pairs_.symmetric && gathered.rows.defined() && !gathered.rows.is_same(gathered.columns)) gathered.rows.add_(gathered.columns);
    grad = finished(of_rows_, pairs_.rows, factor, gathered.row_data(), gathered_factor, grad_);
    if (pairs_.symmetric || !wants_columns()) return;
    grad_ref = finished(of_columns_, pairs_.references, factor, gathered.column_data(), gathered_factor, grad_ref_);
  }

 private:
  static const double* data(const std::vector<double>& scale) { return scale.empty() ? nullptr : scale.data(); }
  static at::Tensor none_yet(const at::Tensor& x) {
    return in_huge_pages(at::empty({x.size(0), x.size(1)}, x.options().dtype(c10::CppTypeToScalarType<T>::value))).zero_();
  }

  at::Tensor finished(const PairSides& sides, const PackedPoints<T>& points, T factor, const T* gathered, T gathered_factor,
                      const at::Tensor& grad) const {
    const GatheredRows<T> g{sides.rows, sides.row_scale, points.original.data(), gathered, points.view.panels, factor, gathered_factor,
                            sides.distance};
    at::parallel_for(0, points.count, row_grain(sides.rows.depth), [&](int64_t begin, int64_t end) {
      kernels_.finish_gradient(g, begin, end, grad.template mutable_data_ptr<T>());
    });
    return grad;
  }

  const Kernels<T>& kernels_;
  const PackedPairs<T>& pairs_;
  std::vector<double> row_scale_, column_scale_;
  PairSides of_rows_, of_columns_;
  at::Tensor grad_, grad_ref_;
};

}  // namespace deepsim::cpu
