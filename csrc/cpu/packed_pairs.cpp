#include "packed_pairs.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../common/stage.h"
#include "huge_pages.h"

namespace deepsim::cpu {

SortedLabels sort_labels(const at::Tensor& labels) {
  const Stage stage("sort");
  const int64_t n = labels.numel();
  SortedLabels sorted{std::vector<int32_t>(n), std::vector<int64_t>(n)};
  const at::Tensor rows = labels.contiguous();
  const int64_t* label = rows.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(label, label + n);
  const uint64_t range = n == 0 ? 0 : uint64_t(*high) - uint64_t(*low);
  if (range <= uint64_t(4 * n)) {
    std::vector<int32_t> next(range + 2);
    for (int64_t i = 0; i < n; ++i) ++next[label[i] - *low + 1];
    for (uint64_t k = 1; k < next.size(); ++k) next[k] += next[k - 1];
    for (int64_t i = 0; i < n; ++i) {
      const int32_t position = next[label[i] - *low]++;
      sorted.order[position] = int32_t(i);
      sorted.labels[position] = label[i];
    }
  } else {
    const auto [values, order] = at::sort(rows, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    std::copy_n(values.const_data_ptr<int64_t>(), n, sorted.labels.begin());
    std::copy_n(order.const_data_ptr<int64_t>(), n, sorted.order.begin());
  }
  return sorted;
}

namespace {

// Both are sorted, so one walk finds all.
PositiveRanges positive_ranges(const std::vector<int64_t>& row_labels, const std::vector<int64_t>& column_labels) {
  const int64_t n = int64_t(row_labels.size()), m = int64_t(column_labels.size());
  PositiveRanges ranges{std::vector<int32_t>(n), std::vector<int32_t>(n)};
  for (int64_t i = 0, low = 0, high = 0; i < n; ++i) {
    while (low < m && column_labels[low] < row_labels[i]) ++low;
    high = std::max(high, low);
    while (high < m && column_labels[high] == row_labels[i]) ++high;
    ranges.begin[i] = int32_t(low);
    ranges.end[i] = int32_t(high);
  }
  return ranges;
}

template <class T>
PackedPoints<T> pack_points(const Kernels<T>& kernels, const Rows& x, const std::vector<int32_t>& order,
                            const std::vector<double>& center, std::vector<double> norm) {
  const Stage stage("pack");
  PackedPoints<T> p;
  p.count = x.count;
  p.panels = (x.count + kernels.panel_rows - 1) / kernels.panel_rows;
  p.norm = std::move(norm);
  p.panel_buffer = in_huge_pages(at::empty({p.panels * kernels.panel_rows * x.depth}, c10::CppTypeToScalarType<T>::value));
  p.half_norm.resize(p.panels * kernels.panel_rows);
  p.original.resize(p.panels * kernels.panel_rows);
  p.view = {p.panel_buffer.template mutable_data_ptr<T>(), p.half_norm.data(), p.original.data(), x.depth};
  const std::vector<T> rounded(center.begin(), center.end());  // any shift does, as long as it is the same for every row
  const Packing<T> packing{order.data(), rounded.data(), p.norm.empty() ? nullptr : p.norm.data()};
  at::parallel_for(0, p.panels, std::max<int64_t>(1, row_grain(x.depth) / kernels.panel_rows),
                   [&](int64_t begin, int64_t end) { kernels.pack(x, packing, begin, end, p.view); });
  return p;
}

template <class T>
std::vector<double> column_means(const Kernels<T>& kernels, const Rows& x, const std::vector<double>& norm) {
  constexpr int64_t kRows = 256;  // summed by one thread, whatever the number of threads
  const Stage stage("centre");
  const int64_t blocks = (x.count + kRows - 1) / kRows;
  std::vector<double> sums(blocks * x.depth), mean(x.depth);
  at::parallel_for(0, blocks, std::max<int64_t>(1, row_grain(x.depth) / kRows), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      kernels.column_sums(x, norm.empty() ? nullptr : norm.data(), b * kRows, std::min(x.count, (b + 1) * kRows), &sums[b * x.depth]);
  });
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t k = 0; k < x.depth; ++k) mean[k] += sums[b * x.depth + k];
  for (double& m : mean) m /= std::max<int64_t>(1, x.count);
  return mean;
}

// The centre on a grid of an eighth to a quarter of the rows' spread: nearly as good, and coordinates that are whole numbers, or of few
// digits, stay so and keep their distances exact, so that equal distances are seen to be equal.
template <class T>
void round_center(const Kernels<T>& kernels, const Rows& x, std::vector<double>& center) {
  constexpr int64_t kSample = 16;  // pairs of rows, evenly spread
  const int64_t step = std::max<int64_t>(1, x.count / (kSample + 1)), count = std::min(x.count - 1, kSample);
  std::vector<int32_t> row, next;
  for (int64_t i = 0; i < count; ++i) {
    row.push_back(int32_t(i * step));
    next.push_back(int32_t((i + 1) * step));
  }
  std::vector<T> square(row.size());
  kernels.pair_distances(x, x, row.data(), next.data(), Distance::sqeuclidean, 0, int64_t(row.size()), square.data());
  double sum = 0;
  for (T s : square) sum += double(s);
  const double spread = std::sqrt(sum / (2 * double(std::max<int64_t>(1, count)) * double(x.depth)));
  if (!(spread > 0) || std::isinf(spread)) return;  // nothing to go by, or a NaN
  const double grid = std::exp2(std::floor(std::log2(spread)) - 2);
  for (double& c : center) c = std::round(c / grid) * grid;
}

// False for a NaN or inf in the rows, and for rows so long (1e18 in float32) that |a - b|^2 could come near to overflow: it is at most
// eight times the larger |.|^2 / 2.
template <class T>
bool can_be_compared(const PackedPoints<T>& p) {
  const T limit = std::numeric_limits<T>::max() / 32;
  return std::all_of(p.half_norm.begin(), p.half_norm.begin() + p.count, [limit](T h) { return h < limit; });
}

template <class T>
std::vector<double> center_of(const Kernels<T>& kernels, const Rows& references, const std::vector<double>& ref_norm, const Rows* anchors,
                              const std::vector<double>& row_norm, Distance distance) {
  std::vector<double> center = column_means(kernels, references, ref_norm);
  if (anchors) {
    // Anchors and references weigh the same, whatever their numbers.
    const std::vector<double> anchor_center = column_means(kernels, *anchors, row_norm);
    for (int64_t k = 0; k < references.depth; ++k) center[k] = (center[k] + anchor_center[k]) / 2;
  }
  if (distance != Distance::cosine) round_center(kernels, references, center);
  return center;
}

}  // namespace

template <class T>
PackedPairs<T> pack_pairs(const Kernels<T>& kernels, const at::Tensor& x, const SortedLabels& sorted, const OptionalTensor& ref,
                          const SortedLabels& ref_sorted, Distance distance, const Center& about) {
  const Rows anchors = rows_of(x), references = ref ? rows_of(*ref) : anchors;
  const bool cosine = distance == Distance::cosine;
  std::vector<double> row_norm, ref_norm;
  if (cosine) row_norm = norms(kernels, anchors);
  if (cosine && ref) ref_norm = norms(kernels, references);
  std::vector<double> center(anchors.depth);
  if (about.given) {
    std::copy_n(about.given->const_data_ptr<double>(), anchors.depth, center.begin());
  } else {
    const Rows* both = ref && about.about == Center::both ? &anchors : nullptr;
    center = center_of(kernels, references, ref ? ref_norm : row_norm, both, row_norm, distance);
  }

  // A zero row has cosine 0 with every row: with |.|^2 / 2 set to 1/2 throughout, 1/2 + 1/2 - 0 says so, as long as the rows
  // are not shifted. (The largest centred squared norm is then near 1, so centring would gain nothing.)
  const auto has_zero = [](const std::vector<double>& norm) { return std::find(norm.begin(), norm.end(), 0.0) != norm.end(); };
  const bool not_shifted = std::all_of(center.begin(), center.end(), [](double c) { return c == 0; });
  const bool zero_rows = cosine && ((about.given && not_shifted) || has_zero(row_norm) || has_zero(ref_norm));
  if (zero_rows) std::fill(center.begin(), center.end(), 0.0);

  PackedPairs<T> pairs;
  pairs.panel_rows = kernels.panel_rows;
  pairs.symmetric = !ref;
  pairs.positives = positive_ranges(sorted.labels, ref_sorted.labels);
  pairs.rows = pack_points(kernels, anchors, sorted.order, center, std::move(row_norm));
  if (ref) pairs.anchors = positive_ranges(ref_sorted.labels, sorted.labels);
  if (ref) pairs.references = pack_points(kernels, references, ref_sorted.order, center, std::move(ref_norm));
  pairs.finite = can_be_compared(pairs.rows) && (!ref || can_be_compared(pairs.references));
  if (zero_rows) {
    std::fill_n(pairs.rows.half_norm.begin(), pairs.rows.count, T(0.5));
    std::fill_n(pairs.references.half_norm.begin(), pairs.references.count, T(0.5));
  }
  return pairs;
}

template <class T>
PackedPairs<T> pack_pairs(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
                          const OptionalTensor& ref_labels, Distance distance, const Center& about) {
  const SortedLabels sorted = sort_labels(labels);
  return ref ? pack_pairs(kernels, x, sorted, ref, sort_labels(*ref_labels), distance, about)
             : pack_pairs(kernels, x, sorted, ref, sorted, distance, about);
}

template PackedPairs<float> pack_pairs(const Kernels<float>&, const at::Tensor&, const SortedLabels&, const OptionalTensor&,
                                       const SortedLabels&, Distance, const Center&);
template PackedPairs<double> pack_pairs(const Kernels<double>&, const at::Tensor&, const SortedLabels&, const OptionalTensor&,
                                        const SortedLabels&, Distance, const Center&);
template PackedPairs<float> pack_pairs(const Kernels<float>&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                       const OptionalTensor&, Distance, const Center&);
template PackedPairs<double> pack_pairs(const Kernels<double>&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                        const OptionalTensor&, Distance, const Center&);

}  // namespace deepsim::cpu
