#include "packed_pairs.h"

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

}  // namespace deepsim::cpu
