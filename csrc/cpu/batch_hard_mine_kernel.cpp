// Batch-hard mining on the CPU: sort by label, centre and pack, search the tiles.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "../batch_hard.h"
#include "../common/stage.h"
#include "batch_hard_mine.h"
#include "capability.h"
#include "rows.h"

namespace deepsim::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();

// Panels on a side of the squares that threads search: enough rows to reuse what is in L2, and so few that every thread gets about
// four squares. (Small ones cost: each takes the best found so far from whichever core was there before.)
constexpr int64_t kMostBlockPanels = 8;

int64_t square_side(int64_t panels) {
  const int64_t blocks = std::max<int64_t>(4, std::lround(std::ceil(std::sqrt(8.0 * at::get_num_threads()))));
  return std::clamp<int64_t>(panels / blocks, 1, kMostBlockPanels);
}

// Squares of `work` multiplications that are worth waking a thread for.
int64_t square_grain(int64_t work) { return std::max<int64_t>(1, 262144 / work); }

struct SortedLabels {
  std::vector<int32_t> order;   // packed position -> row; rows of one label adjacent and in their order
  std::vector<int64_t> labels;  // by packed position
};

// Class numbers are counted; labels that lie far apart are left to torch's sort.
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

// Packed rows and the buffers they stand in.
template <class T>
struct PackedPoints {
  int64_t count, panels;
  std::vector<double> row_scale;
  at::Tensor panel_buffer;
  std::vector<T> half_norm;
  std::vector<int32_t> original;
  PackedRows<T> view;
};

template <class T>
PackedPoints<T> pack(const Kernels<T>& kernels, const Rows& x, const std::vector<int32_t>& order,
                     const std::vector<double>& center, std::vector<double> row_scale) {
  const Stage stage("pack");
  PackedPoints<T> p;
  p.count = x.count;
  p.panels = (x.count + kernels.panel_rows - 1) / kernels.panel_rows;
  p.row_scale = std::move(row_scale);
  p.panel_buffer = at::empty({p.panels * kernels.panel_rows * x.depth}, c10::CppTypeToScalarType<T>::value);
  p.half_norm.resize(p.panels * kernels.panel_rows);
  p.original.resize(p.panels * kernels.panel_rows);
  p.view = {p.panel_buffer.template mutable_data_ptr<T>(), p.half_norm.data(), p.original.data(), x.depth};
  const std::vector<T> rounded(center.begin(), center.end());  // any shift does, as long as it is the same for every row
  const Packing<T> packing{order.data(), rounded.data(), p.row_scale.empty() ? nullptr : p.row_scale.data()};
  at::parallel_for(0, p.panels, std::max<int64_t>(1, row_grain(x.depth) / kernels.panel_rows),
                   [&](int64_t begin, int64_t end) { kernels.pack(x, packing, begin, end, p.view); });
  return p;
}

template <class T>
std::vector<double> column_means(const Kernels<T>& kernels, const Rows& x, const std::vector<double>& row_scale) {
  const Stage stage("centre");
  std::vector<double> mean(x.depth);
  at::parallel_for(0, x.depth, std::max<int64_t>(16, 65536 / std::max<int64_t>(1, x.count)), [&](int64_t begin, int64_t end) {
    kernels.column_sums(x, row_scale.empty() ? nullptr : row_scale.data(), begin, end, mean.data());
  });
  for (double& m : mean) m /= std::max<int64_t>(1, x.count);
  return mean;
}

// False for a NaN or inf in the rows, and for rows so long (1e18 in float32) that |a - b|^2 / 2 could overflow.
template <class T>
bool can_be_compared(const PackedPoints<T>& p) {
  const T limit = std::numeric_limits<T>::max() / 8;
  return std::all_of(p.half_norm.begin(), p.half_norm.begin() + p.count, [limit](T h) { return h < limit; });
}

template <class T>
struct ExtremesBuffer {
  explicit ExtremesBuffer(int64_t n)
      : negative(n, std::numeric_limits<T>::infinity()),
        positive(n, -std::numeric_limits<T>::infinity()),
        negative_index(n, kNobody),
        positive_index(n, kNobody) {}

  Extremes<T> view() { return {negative.data(), positive.data(), negative_index.data(), positive_index.data()}; }

  std::vector<T> negative, positive;
  std::vector<int32_t> negative_index, positive_index;
};

// Into [to, to + n) of `all` whatever in the first n of `part` is better: smaller (larger), then the lower index. Without branches, so
// that it vectorises.
template <class T>
void merge(ExtremesBuffer<T>& all, int64_t to, const ExtremesBuffer<T>& part, int64_t n) {
  const auto take = [&](T* value, int32_t* index, const T* other, const int32_t* other_index, auto better) {
    for (int64_t i = 0; i < n; ++i) {
      const bool takes = better(other[i], value[i]) | ((other[i] == value[i]) & (other_index[i] < index[i]));
      value[i] = takes ? other[i] : value[i];
      index[i] = takes ? other_index[i] : index[i];
    }
  };
  take(all.negative.data() + to, all.negative_index.data() + to, part.negative.data(), part.negative_index.data(), std::less<T>());
  take(all.positive.data() + to, all.positive_index.data() + to, part.positive.data(), part.positive_index.data(), std::greater<T>());
}

template <class T>
void copy(const ExtremesBuffer<T>& all, int64_t from, int64_t n, ExtremesBuffer<T>& part) {
  std::copy_n(all.negative.begin() + from, n, part.negative.begin());
  std::copy_n(all.positive.begin() + from, n, part.positive.begin());
  std::copy_n(all.negative_index.begin() + from, n, part.negative_index.begin());
  std::copy_n(all.positive_index.begin() + from, n, part.positive_index.begin());
}

// Searches rows against columns, square of panels by square. A square starts from the best found so far, which saves work,
// and hands its finds back under the lock of its rows (columns); the order in which that happens cannot be seen.
template <class T>
ExtremesBuffer<T> search(const Kernels<T>& kernels, const PackedPoints<T>& rows, const PackedPoints<T>& columns,
                         const std::vector<int32_t>& positive_begin, const std::vector<int32_t>& positive_end, bool symmetric) {
  const Stage stage("tiles");
  const int64_t width = kernels.panel_rows;
  const int64_t side = square_side(std::min(rows.panels, columns.panels));
  const int64_t row_blocks = (rows.panels + side - 1) / side, column_blocks = (columns.panels + side - 1) / side;
  const int64_t squares = symmetric ? row_blocks * (row_blocks + 1) / 2 : row_blocks * column_blocks;

  ExtremesBuffer<T> best(rows.panels * width);
  std::vector<std::mutex> locks(row_blocks);

  at::parallel_for(0, squares, square_grain(side * width * side * width * rows.view.depth), [&](int64_t begin, int64_t end) {
    ExtremesBuffer<T> row_best(side * width), column_best(side * width);
    const auto with_lock = [&](int64_t block, auto action) {
      const int64_t first = block * side, count = std::min(side, rows.panels - first) * width;
      std::lock_guard<std::mutex> guard(locks[block]);
      action(first * width, count);
    };
    // The first square of this thread, then on along the rows of the (triangle or rectangle of) squares.
    int64_t i = 0, j = 0, skipped = begin;
    for (; skipped >= column_blocks - (symmetric ? i : 0); ++i) skipped -= column_blocks - (symmetric ? i : 0);
    j = (symmetric ? i : 0) + skipped;
    for (int64_t square = begin; square < end; ++square) {
      const bool both = symmetric && i != j;
      with_lock(i, [&](int64_t first, int64_t count) { copy(best, first, count, row_best); });
      if (both) with_lock(j, [&](int64_t first, int64_t count) { copy(best, first, count, column_best); });
      const TileBlock<T> tiles{rows.view,  columns.view, positive_begin.data(), positive_end.data(),
                               rows.count, i * side,     std::min((i + 1) * side, rows.panels), j * side,
                               std::min((j + 1) * side, columns.panels), symmetric};
      kernels.mine({tiles, row_best.view(), both ? column_best.view() : row_best.view()});
      with_lock(i, [&](int64_t first, int64_t count) { merge(best, first, row_best, count); });
      if (both) with_lock(j, [&](int64_t first, int64_t count) { merge(best, first, column_best, count); });
      if (++j == column_blocks) j = symmetric ? ++i : (++i, 0);
    }
  });
  return best;
}

// Columns with the label of each row: [begin, end). Both are sorted, so one walk finds all.
std::pair<std::vector<int32_t>, std::vector<int32_t>> positive_ranges(const std::vector<int64_t>& row,
                                                                      const std::vector<int64_t>& column) {
  const int64_t n = int64_t(row.size()), m = int64_t(column.size());
  std::vector<int32_t> begin(n), end(n);
  for (int64_t i = 0, low = 0, high = 0; i < n; ++i) {
    while (low < m && column[low] < row[i]) ++low;
    high = std::max(high, low);
    while (high < m && column[high] == row[i]) ++high;
    begin[i] = int32_t(low);
    end[i] = int32_t(high);
  }
  return {std::move(begin), std::move(end)};
}

template <class T>
Mined mine(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
           const OptionalTensor& ref_labels, Distance distance) {
  const Rows anchors = rows_of(x), references = ref ? rows_of(*ref) : anchors;
  const bool cosine = distance == Distance::cosine;

  // Cosine distance is half the squared Euclidean one of the normalised rows.
  std::vector<double> row_scale, ref_scale;
  if (cosine) row_scale = inverse_norms(kernels, anchors);
  if (cosine && ref) ref_scale = inverse_norms(kernels, references);
  std::vector<double> center = column_means(kernels, references, ref ? ref_scale : row_scale);
  if (ref) {
    // One centre for both; anchors and references weigh the same, whatever their numbers.
    const std::vector<double> anchor_center = column_means(kernels, anchors, row_scale);
    for (int64_t k = 0; k < anchors.depth; ++k) center[k] = (center[k] + anchor_center[k]) / 2;
  }

  // A zero row has cosine 0 with every row: with |.|^2 / 2 set to 1/2 throughout, 1/2 + 1/2 - 0 says so, as long as the rows
  // are not shifted. (The largest centred squared norm is then near 1, so centring would gain nothing.)
  const auto has_zero = [](const std::vector<double>& scale) { return std::find(scale.begin(), scale.end(), 0.0) != scale.end(); };
  const bool zero_rows = cosine && (has_zero(row_scale) || has_zero(ref_scale));
  if (zero_rows) std::fill(center.begin(), center.end(), 0.0);

  const SortedLabels sorted = sort_labels(labels);
  const SortedLabels ref_sorted = ref ? sort_labels(*ref_labels) : sorted;
  const auto [positive_begin, positive_end] = positive_ranges(sorted.labels, ref_sorted.labels);

  PackedPoints<T> rows = pack(kernels, anchors, sorted.order, center, std::move(row_scale));
  PackedPoints<T> ref_rows;
  if (ref) ref_rows = pack(kernels, references, ref_sorted.order, center, std::move(ref_scale));
  const bool finite = can_be_compared(rows) && (!ref || can_be_compared(ref_rows));
  for (PackedPoints<T>* p : {&rows, ref ? &ref_rows : &rows}) {
    if (zero_rows) std::fill_n(p->half_norm.begin(), p->count, T(0.5));
  }

  Mined mined{at::full({anchors.count}, -1, at::kInt), at::full({anchors.count}, -1, at::kInt), finite};
  if (!finite) return mined;
  const ExtremesBuffer<T> best = search(kernels, rows, ref ? ref_rows : rows, positive_begin, positive_end, !ref);
  int32_t* positives = mined.positives.mutable_data_ptr<int32_t>();
  int32_t* negatives = mined.negatives.mutable_data_ptr<int32_t>();
  for (int64_t p = 0; p < anchors.count; ++p) {
    if (best.positive_index[p] == kNobody || best.negative_index[p] == kNobody) continue;
    positives[sorted.order[p]] = best.positive_index[p];
    negatives[sorted.order[p]] = best.negative_index[p];
  }
  return mined;
}

std::tuple<at::Tensor, at::Tensor> batch_hard_mine(const at::Tensor& embeddings, const at::Tensor& labels,
                                                   const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
                                                   std::string_view distance) {
  constexpr const char* function = "batch_hard_mine";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  Mined mined = mine_batch_hard(x, labels, ref, ref_labels, d);
  return {mined.positives, mined.negatives};
}

}  // namespace

Mined mine_batch_hard(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                      const OptionalTensor& ref_labels, Distance distance) {
  return dispatch(embeddings.scalar_type(), [&](const auto& kernels) {
    return mine(kernels, embeddings, labels, ref_embeddings, ref_labels, distance);
  });
}

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("batch_hard_mine", batch_hard_mine); }

}  // namespace deepsim::cpu
