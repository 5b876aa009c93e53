// What losses over all pairs of a batch share on the CPU: the walk over squares, and the gradient's last step.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "../common/stage.h"
#include "../common/triplet_loss.h"
#include "packed_pairs.h"
#include "positive_lists.h"
#include "rounds.h"

namespace deepsim::cpu {

// Blocks that the panels of one side are cut into, as even as can be.
struct Blocks {
  int64_t panels, count;

  int64_t begin(int64_t block) const { return panels * block / count; }
};

// By the shape alone: two blocks of a square and their gradients should stay in L2, and rounds of 8 squares, or a multiple, share out
// evenly among 2, 4 or 8 threads.
template <class T>
Blocks blocks_of(const PackedPairs<T>& pairs, int64_t panels) {
  constexpr int64_t kBlockBytes = 128 * 1024, kMostPanels = 4, kCommonCount = 16;
  const int64_t panel_bytes = pairs.panel_rows * pairs.rows.view.depth * int64_t(sizeof(T));
  const int64_t most = std::clamp<int64_t>(kBlockBytes / panel_bytes, 1, kMostPanels);
  const int64_t count = (panels + most * kCommonCount - 1) / (most * kCommonCount) * kCommonCount;
  return {panels, std::min(panels, count)};
}

// Calls run(tiles, sums) for every square of pairs, with exclusive use of its rows and columns and of its row block's sums. Returns these.
template <class Sums, class T, class Run>
std::vector<Sums> over_squares(const PackedPairs<T>& pairs, Run run) {
  const Stage stage("tiles");
  const Blocks rows = blocks_of(pairs, pairs.rows.panels), columns = blocks_of(pairs, pairs.columns().panels);
  const Rounds rounds(rows.count, columns.count, pairs.symmetric);
  std::vector<Sums> sums(rows.count);
  rounds.for_each([&](int64_t i, int64_t j) {
    run(pairs.tiles(rows.begin(i), rows.begin(i + 1), columns.begin(j), columns.begin(j + 1)), sums[i]);
  });
  return sums;
}

// The same for what leaves no sums: run(tiles).
template <class T, class Run>
void over_squares(const PackedPairs<T>& pairs, Run run) {
  struct Nothing {};
  over_squares<Nothing>(pairs, [&](const TileBlock<T>& tiles, Nothing&) { run(tiles); });
}

// The gradient that tiles gather, by packed row and column; empty where none is wanted.
template <class T>
struct GatheredGradient {
  at::Tensor rows, columns;  // of columns only where there is a reference set

  GatheredGradient() = default;
  explicit GatheredGradient(const PackedPairs<T>& pairs)
      : rows(none_yet(pairs, pairs.rows)), columns(pairs.symmetric ? rows : none_yet(pairs, pairs.references)) {}

  T* row_data() const { return rows.defined() ? rows.template mutable_data_ptr<T>() : nullptr; }
  T* column_data() const { return columns.defined() ? columns.template mutable_data_ptr<T>() : nullptr; }

 private:
  static at::Tensor none_yet(const PackedPairs<T>& pairs, const PackedPoints<T>& points) {
    return at::zeros({points.panels * pairs.panel_rows * gathered_depth(points.view.depth)}, points.panel_buffer.options());
  }
};

// For every packed row (or column) of one side, pairs whose distances have a weight in the loss, beside those that were gathered.
template <class T>
struct PairLists {
  std::vector<int64_t> begin;  // [rows + 1]
  std::vector<int32_t> other;  // row of the other side, as the input has it
  std::vector<T> distance, weight;
};

// Each row's pairs with its positives; weight(p, s) is that of the distance from p to its s-th positive. In the self form the mirror
// image of a pair weighs on the row as well.
template <class T, class Weight>
PairLists<T> pairs_of_rows(const PackedPairs<T>& pairs, const PositiveLists<T>& lists, Weight weight) {
  PairLists<T> result{std::vector<int64_t>(pairs.rows.count + 1), {}, {}, {}};
  for (int64_t p = 0; p < pairs.rows.count; ++p) result.begin[p + 1] = result.begin[p] + pairs.positive_count(p);
  result.other.resize(result.begin.back());
  result.distance.resize(result.begin.back());
  result.weight.resize(result.begin.back());
  at::parallel_for(0, pairs.rows.count, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t s = 0; s < pairs.positive_count(p); ++s) {
        const int64_t c = positive_column(pairs, p, s), pair = result.begin[p] + s;
        result.other[pair] = pairs.columns().original[c];
        result.distance[pair] = lists.distance[lists.at(p, s)];
        result.weight[pair] = weight(p, s);
        // Row p in the list of row c, which leaves out c itself.
        if (pairs.symmetric) result.weight[pair] += weight(c, p - pairs.positives.begin[c] - (p > c));
      }
    }
  });
  return result;
}

// From a function that calls emit(row, other, distance, weight) for every pair, in the same order whenever it is called.
template <class T, class ForEach>
PairLists<T> pair_lists(int64_t rows, ForEach for_each) {
  PairLists<T> result{std::vector<int64_t>(rows + 1), {}, {}, {}};
  for_each([&](int64_t row, int32_t, T, T) { ++result.begin[row + 1]; });
  for (int64_t i = 0; i < rows; ++i) result.begin[i + 1] += result.begin[i];
  result.other.resize(result.begin.back());
  result.distance.resize(result.begin.back());
  result.weight.resize(result.begin.back());
  std::vector<int64_t> next(result.begin.begin(), result.begin.end() - 1);
  for_each([&](int64_t row, int32_t other, T distance, T weight) {
    const int64_t pair = next[row]++;
    result.other[pair] = other;
    result.distance[pair] = distance;
    result.weight[pair] = weight;
  });
  return result;
}

// The columns' pairs with their positives, for a reference set.
template <class T, class Weight>
PairLists<T> pairs_of_columns(const PackedPairs<T>& pairs, const PositiveLists<T>& lists, Weight weight) {
  return pair_lists<T>(pairs.references.count, [&](auto emit) {
    for (int64_t p = 0; p < pairs.rows.count; ++p)
      for (int64_t s = 0; s < pairs.positive_count(p); ++s)
        emit(pairs.positives.begin[p] + s, pairs.rows.original[p], lists.distance[lists.at(p, s)], weight(p, s));
  });
}

// One side's gradient, [rows][depth] in the type of the arithmetic. x: the side's rows as `points` has packed them.
template <class T>
at::Tensor finish_gradient(const Kernels<T>& kernels, const at::Tensor& x, const PackedPoints<T>& points, const at::Tensor& others,
                           const PackedPoints<T>& other_points, const T* gathered, T factor, const PairLists<T>& lists,
                           Distance distance) {
  const Stage stage("gradient");
  const std::vector<double> row_scale = inverse(points.norm), other_scale = inverse(other_points.norm);
  const auto data = [](const std::vector<double>& scale) { return scale.empty() ? nullptr : scale.data(); };
  at::Tensor grad = at::empty({x.size(0), x.size(1)}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
  T* out = grad.template mutable_data_ptr<T>();
  const PairGradient<T> g{rows_of(x), rows_of(others), data(row_scale), data(other_scale), points.original.data(), gathered,
                          points.view.panels, factor,
                          lists.begin.data(), lists.other.data(), lists.distance.data(), lists.weight.data(), distance};
  at::parallel_for(0, points.count, row_grain(x.size(1)),
                   [&](int64_t begin, int64_t end) { kernels.pair_gradient(g, begin, end, out); });
  return grad;
}

// What the forward ops of these losses return: the loss, its statistics and the gradients of the loss, which backward only scales.
struct LossWithGradient {
  at::Tensor loss, counts, means, grad, grad_ref;  // counts int64; gradients in the type of the arithmetic, no rows if not wanted
};

template <class T>
LossWithGradient loss_with_gradient(const at::Tensor& x, double loss, const std::vector<int64_t>& counts,
                                    const std::vector<double>& means) {
  const auto options = x.options().dtype(c10::CppTypeToScalarType<T>::value);
  // Rounded here: what is too large for T becomes inf, which torch takes for a mistake.
  const std::vector<T> rounded(means.begin(), means.end());
  return {at::full({}, double(T(loss)), options), at::tensor(counts, x.options().dtype(at::kLong)), at::tensor(rounded, options),
          at::empty({0, x.size(1)}, options), at::empty({0, x.size(1)}, options)};
}

// What comes of a NaN or inf in the input.
template <class T>
LossWithGradient not_finite(const at::Tensor& x, const OptionalTensor& ref, const std::vector<int64_t>& counts, bool with_gradient) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  LossWithGradient result = loss_with_gradient<T>(x, nan, counts, {nan, nan});
  if (!with_gradient) return result;
  result.grad = at::full({x.size(0), x.size(1)}, nan, result.loss.options());
  if (ref) result.grad_ref = at::full({ref->size(0), x.size(1)}, nan, result.loss.options());
  return result;
}

inline double ratio(double sum, int64_t count) { return count > 0 ? sum / double(count) : 0; }

}  // namespace deepsim::cpu
