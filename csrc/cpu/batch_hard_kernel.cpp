// Batch-hard on the CPU: sort by label, centre and pack, search the tiles, measure the chosen pairs, gather the gradient.
#include "../batch_hard.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "capability.h"

namespace deepsim::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int32_t kNobody = std::numeric_limits<int32_t>::max();

// Panels on a side of the squares that threads search: enough rows to reuse what is in L2, few enough for balance.
constexpr int64_t kMostBlockPanels = 8;
constexpr int64_t kFewestBlocks = 8;

at::Tensor with_adjacent_columns(const at::Tensor& x) { return x.size(1) == 1 || x.stride(1) == 1 ? x : x.contiguous(); }

Rows rows_of(const at::Tensor& x) { return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0)}; }

// Rows of `depth` elements, squares of `work` multiplications, that are worth waking a thread for.
int64_t row_grain(int64_t depth) { return std::max<int64_t>(1, 16384 / depth); }
int64_t square_grain(int64_t work) { return std::max<int64_t>(1, 262144 / work); }

template <class T>
std::vector<double> inverse_norms(const Kernels<T>& kernels, const Rows& x) {
  std::vector<double> scale(x.count);
  at::parallel_for(0, x.count, row_grain(x.depth),
                   [&](int64_t begin, int64_t end) { kernels.inverse_norms(x, begin, end, scale.data()); });
  return scale;
}

struct SortedLabels {
  std::vector<int32_t> order;  // packed position -> row; rows of one label adjacent and in their order
  at::Tensor labels;           // by packed position
};

SortedLabels sort_labels(const at::Tensor& labels) {
  auto [sorted, order] = at::sort(labels, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const int64_t* p = order.const_data_ptr<int64_t>();
  return {std::vector<int32_t>(p, p + order.numel()), sorted};
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
  PackedPoints<T> p;
  p.count = x.count;
  p.panels = (x.count + kernels.panel_rows - 1) / kernels.panel_rows;
  p.row_scale = std::move(row_scale);
  p.panel_buffer = at::empty({p.panels * kernels.panel_rows * x.depth}, c10::CppTypeToScalarType<T>::value);
  p.half_norm.resize(p.panels * kernels.panel_rows);
  p.original.resize(p.panels * kernels.panel_rows);
  p.view = {p.panel_buffer.template mutable_data_ptr<T>(), p.half_norm.data(), p.original.data(), x.depth};
  const Packing packing{order.data(), center.data(), p.row_scale.empty() ? nullptr : p.row_scale.data()};
  at::parallel_for(0, p.panels, std::max<int64_t>(1, row_grain(x.depth) / kernels.panel_rows),
                   [&](int64_t begin, int64_t end) { kernels.pack(x, packing, begin, end, p.view); });
  return p;
}

template <class T>
std::vector<double> column_means(const Kernels<T>& kernels, const Rows& x, const std::vector<double>& row_scale) {
  std::vector<double> mean(x.depth);
  at::parallel_for(0, x.depth, std::max<int64_t>(16, 65536 / std::max<int64_t>(1, x.count)), [&](int64_t begin, int64_t end) {
    kernels.column_sums(x, row_scale.empty() ? nullptr : row_scale.data(), begin, end, mean.data());
  });
  for (double& m : mean) m /= std::max<int64_t>(1, x.count);
  return mean;
}

template <class Container>
bool all_finite(const Container& values, int64_t count) {
  return std::all_of(values.begin(), values.begin() + count, [](auto v) { return std::isfinite(v); });
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

// Into [to, to + n) of `all` whatever in the first n of `part` is better: smaller (larger), then the lower index.
template <class T>
void merge(ExtremesBuffer<T>& all, int64_t to, const ExtremesBuffer<T>& part, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const T negative = part.negative[i], positive = part.positive[i];
    if (std::tie(negative, part.negative_index[i]) < std::tie(all.negative[to + i], all.negative_index[to + i])) {
      all.negative[to + i] = negative;
      all.negative_index[to + i] = part.negative_index[i];
    }
    if (positive > all.positive[to + i] ||
        (positive == all.positive[to + i] && part.positive_index[i] < all.positive_index[to + i])) {
      all.positive[to + i] = positive;
      all.positive_index[to + i] = part.positive_index[i];
    }
  }
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
  const int64_t width = kernels.panel_rows;
  const int64_t side = std::clamp<int64_t>(std::min(rows.panels, columns.panels) / kFewestBlocks, 1, kMostBlockPanels);
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
      kernels.mine({rows.view, columns.view, positive_begin.data(), positive_end.data(), rows.count, i * side,
                    std::min((i + 1) * side, rows.panels), j * side, std::min((j + 1) * side, columns.panels), symmetric,
                    row_best.view(), both ? column_best.view() : row_best.view()});
      with_lock(i, [&](int64_t first, int64_t count) { merge(best, first, row_best, count); });
      if (both) with_lock(j, [&](int64_t first, int64_t count) { merge(best, first, column_best, count); });
      if (++j == column_blocks) j = symmetric ? ++i : (++i, 0);
    }
  });
  return best;
}

// Columns with the label of each row: [begin, end). Both are sorted, so one walk finds all.
std::pair<std::vector<int32_t>, std::vector<int32_t>> positive_ranges(const at::Tensor& rows, const at::Tensor& columns) {
  const int64_t *row = rows.const_data_ptr<int64_t>(), *column = columns.const_data_ptr<int64_t>();
  const int64_t n = rows.numel(), m = columns.numel();
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

struct Mined {
  at::Tensor positives, negatives;  // [N] int32, -1 where the anchor is not valid
  bool finite;                      // false: a NaN or inf somewhere, nothing was chosen
};

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
  bool finite = all_finite(center, anchors.depth);

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
  for (PackedPoints<T>* p : {&rows, ref ? &ref_rows : &rows}) {
    finite = finite && all_finite(p->half_norm, p->count);
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

// l = max(0, z) with z = d_ap - d_an + margin, or log(1 + exp(d_ap - d_an)); and its derivative by d_ap.
template <class T>
struct TripletLoss {
  T margin;
  bool soft;

  T value(T d_ap, T d_an) const {
    const T z = d_ap - d_an;
    if (soft) return std::log1p(std::exp(-std::abs(z))) + (z < 0 ? T(0) : z);
    return z + margin <= 0 ? T(0) : z + margin;  // NaN stays NaN
  }
  T derivative(T d_ap, T d_an) const {
    const T z = d_ap - d_an;
    if (soft) return 1 / (1 + std::exp(-z));
    return z + margin <= 0 ? T(0) : z + margin > 0 ? T(1) : z;
  }
};

// The number of anchors that the sum of losses is divided by.
template <class T>
T divisor(Reduction reduction, const TripletLoss<T>& loss, const int32_t* positives, const T* d_ap, const T* d_an, int64_t n) {
  if (reduction == Reduction::sum || reduction == Reduction::none) return T(1);
  int64_t count = 0;
  for (int64_t a = 0; a < n; ++a)
    count += positives[a] >= 0 && (reduction == Reduction::mean || loss.value(d_ap[a], d_an[a]) > 0);
  return T(std::max<int64_t>(1, count));
}

std::tuple<at::Tensor, at::Tensor> batch_hard_mine(const at::Tensor& embeddings, const at::Tensor& labels,
                                                   const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
                                                   std::string_view distance) {
  constexpr const char* function = "batch_hard_mine";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    Mined mined = mine(kernels, x, labels, ref, ref_labels, d);
    return std::make_tuple(mined.positives, mined.negatives);
  });
}

template <class T>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> loss_forward(
    const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
    const OptionalTensor& ref_labels, const TripletLoss<T>& loss, Distance distance, Reduction reduction) {
  const Mined mined = mine(kernels, x, labels, ref, ref_labels, distance);
  const int64_t n = x.size(0);
  const auto options = x.options().dtype(c10::CppTypeToScalarType<T>::value);
  at::Tensor d_ap = at::empty({n}, options), d_an = at::empty({n}, options);
  T *ap = d_ap.mutable_data_ptr<T>(), *an = d_an.mutable_data_ptr<T>();
  const int32_t *positives = mined.positives.const_data_ptr<int32_t>(), *negatives = mined.negatives.const_data_ptr<int32_t>();
  if (mined.finite) {
    at::parallel_for(0, n, row_grain(x.size(1)), [&](int64_t begin, int64_t end) {
      kernels.triplet_distances(rows_of(x), rows_of(ref ? *ref : x), positives, negatives, distance, begin, end, ap, an);
    });
  } else {
    d_ap.fill_(std::numeric_limits<double>::quiet_NaN());
    d_an.fill_(std::numeric_limits<double>::quiet_NaN());
  }

  const auto anchor_loss = [&](int64_t a) { return positives[a] >= 0 || !mined.finite ? loss.value(ap[a], an[a]) : T(0); };
  at::Tensor result;
  if (reduction == Reduction::none) {
    result = at::empty({n}, options);
    T* out = result.mutable_data_ptr<T>();
    for (int64_t a = 0; a < n; ++a) out[a] = anchor_loss(a);
  } else {
    double sum = mined.finite ? 0 : std::numeric_limits<double>::quiet_NaN();
    for (int64_t a = 0; a < n; ++a) sum += anchor_loss(a);
    result = at::empty({}, options);
    *result.mutable_data_ptr<T>() = T(sum / divisor(reduction, loss, positives, ap, an, n));
  }
  return {result, d_ap, d_an, mined.positives, mined.negatives};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_hard_triplet_loss(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
    double margin, bool soft, std::string_view distance, std::string_view reduction) {
  constexpr const char* function = "batch_hard_triplet_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const Reduction r = reduction_from(function, reduction);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    return loss_forward<T>(kernels, x, labels, ref, ref_labels, {T(margin), soft}, d, r);
  });
}

// Who chose each reference row, in ascending order of the anchors.
struct Uses {
  std::vector<int64_t> begin;
  std::vector<int32_t> uses;
};

Uses uses_of(const int32_t* positives, const int32_t* negatives, int64_t anchors, int64_t references) {
  Uses u{std::vector<int64_t>(references + 1, 0), {}};
  const auto checked = [&](int32_t index) {
    TORCH_CHECK_INDEX(index >= 0 && index < references, "batch_hard_triplet_loss_backward: positives and negatives must be in [0, ",
                      references, ") or both -1, got ", index);
    return index;
  };
  for (int64_t a = 0; a < anchors; ++a) {
    if (positives[a] == -1 && negatives[a] == -1) continue;
    ++u.begin[checked(positives[a]) + 1];
    ++u.begin[checked(negatives[a]) + 1];
  }
  for (int64_t j = 0; j < references; ++j) u.begin[j + 1] += u.begin[j];
  u.uses.resize(u.begin[references]);
  std::vector<int64_t> next(u.begin.begin(), u.begin.end() - 1);
  for (int64_t a = 0; a < anchors; ++a) {
    if (positives[a] < 0) continue;
    u.uses[next[positives[a]]++] = int32_t(2 * a);
    u.uses[next[negatives[a]]++] = int32_t(2 * a + 1);
  }
  return u;
}

template <class T>
std::tuple<at::Tensor, at::Tensor> loss_backward(const Kernels<T>& kernels, const at::Tensor& grad_loss, const at::Tensor& x,
                                                 const OptionalTensor& ref, const at::Tensor& positives,
                                                 const at::Tensor& negatives, const at::Tensor& d_ap, const at::Tensor& d_an,
                                                 const TripletLoss<T>& loss, Distance distance, Reduction reduction) {
  const int64_t n = x.size(0), depth = x.size(1);
  const int32_t *p = positives.const_data_ptr<int32_t>(), *q = negatives.const_data_ptr<int32_t>();
  const T *ap = d_ap.const_data_ptr<T>(), *an = d_an.const_data_ptr<T>(), *g = grad_loss.const_data_ptr<T>();
  const Uses uses = uses_of(p, q, n, ref ? ref->size(0) : n);

  at::Tensor grad = at::empty({n, depth}, x.options());
  at::Tensor grad_ref = at::empty({ref ? ref->size(0) : 0, depth}, x.options());
  if (std::any_of(ap, ap + n, [](T d) { return std::isnan(d); })) {
    grad.fill_(std::numeric_limits<double>::quiet_NaN());
    grad_ref.fill_(std::numeric_limits<double>::quiet_NaN());
    return {grad, grad_ref};
  }

  std::vector<T> coefficient(n);
  const T scale = 1 / divisor(reduction, loss, p, ap, an, n);
  for (int64_t a = 0; a < n; ++a)
    if (p[a] >= 0) coefficient[a] = g[reduction == Reduction::none ? a : 0] * scale * loss.derivative(ap[a], an[a]);

  const Rows anchors = rows_of(x), references = ref ? rows_of(*ref) : anchors;
  std::vector<double> anchor_scale, reference_scale;
  if (distance == Distance::cosine) {
    anchor_scale = inverse_norms(kernels, anchors);
    if (ref) reference_scale = inverse_norms(kernels, references);
  }
  const double* anchor_scales = anchor_scale.empty() ? nullptr : anchor_scale.data();
  const TripletGradient<T> gradient{anchors,       references, p, q, ap, an, coefficient.data(), anchor_scales,
                                    ref ? (reference_scale.empty() ? nullptr : reference_scale.data()) : anchor_scales,
                                    uses.begin.data(), uses.uses.data(), distance};
  const auto run = [&](auto kernel, at::Tensor& out) {
    void* data = out.mutable_data_ptr();
    at::parallel_for(0, out.size(0), row_grain(depth), [&](int64_t begin, int64_t end) {
      std::vector<T> row(depth);
      kernel(gradient, begin, end, row.data(), data);
    });
  };
  if (ref) {
    run(kernels.anchor_gradient, grad);
    run(kernels.reference_gradient, grad_ref);
  } else {
    run(kernels.self_gradient, grad);
  }
  return {grad, grad_ref};
}

std::tuple<at::Tensor, at::Tensor> batch_hard_triplet_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& embeddings, const OptionalTensor& ref_embeddings, const at::Tensor& positives,
    const at::Tensor& negatives, const at::Tensor& d_ap, const at::Tensor& d_an, double margin, bool soft, std::string_view distance,
    std::string_view reduction) {
  constexpr const char* function = "batch_hard_triplet_loss_backward";
  const Distance d = distance_from(function, distance);
  const Reduction r = reduction_from(function, reduction);
  check_backward(grad_loss, embeddings, ref_embeddings, positives, negatives, d_ap, d_an, r);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    return loss_backward<T>(kernels, grad_loss.contiguous(), x, ref, positives.contiguous(), negatives.contiguous(),
                            d_ap.contiguous(), d_an.contiguous(), {T(margin), soft}, d, r);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) {
  m.impl("batch_hard_mine", batch_hard_mine);
  m.impl("batch_hard_triplet_loss", batch_hard_triplet_loss);
  m.impl("batch_hard_triplet_loss_backward", batch_hard_triplet_loss_backward);
}

}  // namespace deepsim::cpu
