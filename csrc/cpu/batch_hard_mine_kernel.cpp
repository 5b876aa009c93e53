// Batch-hard mining on the CPU: sort by label, centre and pack, search the tiles.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "../batch_hard.h"
#include "../common/stage.h"
#include "capability.h"
#include "choose_again.h"
#include "mined.h"
#include "packed_pairs.h"

namespace deepsim::cpu {
namespace {

// Panels on a side of the squares that threads search: enough rows to reuse what is in L2, and so few that every thread gets about
// four squares. (Small ones cost: each takes the best found so far from whichever core was there before.)
constexpr int64_t kMostBlockPanels = 8;

int64_t square_side(int64_t panels) {
  const int64_t blocks = std::max<int64_t>(4, std::lround(std::ceil(std::sqrt(8.0 * at::get_num_threads()))));
  return std::clamp<int64_t>(panels / blocks, 1, kMostBlockPanels);
}

// Squares of `work` multiplications that are worth waking a thread for.
int64_t square_grain(int64_t work) { return std::max<int64_t>(1, 262144 / work); }

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

// The best of the rows, or columns, of one side, whose blocks are taken under their locks.
template <class T>
class SharedExtremes {
 public:
  SharedExtremes(int64_t panels, int64_t width, int64_t block_panels)
      : best(panels * width), locks_((panels + block_panels - 1) / block_panels), panels_(panels), width_(width), side_(block_panels) {}

  void read(int64_t block, ExtremesBuffer<T>& part) {
    with_lock(block, [&](int64_t first, int64_t count) { copy(best, first, count, part); });
  }
  void improve(int64_t block, const ExtremesBuffer<T>& part) {
    with_lock(block, [&](int64_t first, int64_t count) { merge(best, first, part, count); });
  }

  ExtremesBuffer<T> best;

 private:
  template <class Action>
  void with_lock(int64_t block, Action action) {
    const int64_t first = block * side_, count = std::min(side_, panels_ - first) * width_;
    std::lock_guard<std::mutex> guard(locks_[block]);
    action(first * width_, count);
  }

  std::vector<std::mutex> locks_;
  int64_t panels_, width_, side_;
};

template <class T>
struct Found {
  ExtremesBuffer<T> rows, columns;  // columns of a reference set, where they are searched too
};

// Searches rows against columns, square of panels by square, for the best of the rows and, if `of_columns`, of a reference set's rows as
// well. A square starts from the best found so far, which saves work, and hands its finds back under the lock of its rows (columns);
// the order in which that happens cannot be seen.
template <class T>
Found<T> search(const Kernels<T>& kernels, const PackedPairs<T>& pairs, bool of_columns) {
  const Stage stage("tiles");
  const PackedPoints<T>&rows = pairs.rows, &columns = pairs.columns();
  const bool symmetric = pairs.symmetric;
  const int64_t width = kernels.panel_rows;
  const int64_t side = square_side(std::min(rows.panels, columns.panels));
  const int64_t row_blocks = (rows.panels + side - 1) / side, column_blocks = (columns.panels + side - 1) / side;
  const int64_t squares = symmetric ? row_blocks * (row_blocks + 1) / 2 : row_blocks * column_blocks;

  SharedExtremes<T> row_side(rows.panels, width, side), reference_side(of_columns ? columns.panels : 0, width, side);
  SharedExtremes<T>& column_side = symmetric ? row_side : reference_side;

  at::parallel_for(0, squares, square_grain(side * width * side * width * rows.view.depth), [&](int64_t begin, int64_t end) {
    ExtremesBuffer<T> row_best(side * width), column_best(side * width);
    // The first square of this thread, then on along the rows of the (triangle or rectangle of) squares.
    int64_t i = 0, j = 0, skipped = begin;
    for (; skipped >= column_blocks - (symmetric ? i : 0); ++i) skipped -= column_blocks - (symmetric ? i : 0);
    j = (symmetric ? i : 0) + skipped;
    for (int64_t square = begin; square < end; ++square) {
      const bool both = symmetric ? i != j : of_columns;
      row_side.read(i, row_best);
      if (both) column_side.read(j, column_best);
      const TileBlock<T> tiles = pairs.tiles(i * side, std::min((i + 1) * side, rows.panels), j * side,
                                             std::min((j + 1) * side, columns.panels));
      kernels.mine({tiles, row_best.view(), both ? column_best.view() : row_best.view(), of_columns});
      row_side.improve(i, row_best);
      if (both) column_side.improve(j, column_best);
      if (++j == column_blocks) j = symmetric ? ++i : (++i, 0);
    }
  });
  return {std::move(row_side.best), std::move(reference_side.best)};
}

template <class T>
Mined mine(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
           const OptionalTensor& ref_labels, Distance distance) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, distance);
  return mine_packed(pairs, [&] {
    ExtremesBuffer<T> best = search(kernels, pairs, false).rows;
    choose_positives_again<T>(kernels, pairs, distance, {best.positive, best.positive_index});
    choose_negatives_again<T>(kernels, pairs, distance, {best.negative, best.negative_index});
    return std::pair(std::move(best.positive_index), std::move(best.negative_index));
  });
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

// Of one side's rows, as the input has them: [2, N] largest |a - b|^2 / 2 to a positive (-inf where there is none) and smallest to a
// negative (inf); and whom, -1 for nobody.
struct SideExtremes {
  at::Tensor half_squares, indices;
};

template <class T>
SideExtremes by_row(const ExtremesBuffer<T>& best, const PackedPoints<T>& points) {
  const int64_t n = points.count;
  SideExtremes side{at::empty({2, n}, points.panel_buffer.options()), at::empty({2, n}, at::kInt)};
  const auto unpack = [&](int64_t which, const std::vector<T>& value, const std::vector<int32_t>& index) {
    T* values = side.half_squares.template mutable_data_ptr<T>() + which * n;
    int32_t* indices = side.indices.template mutable_data_ptr<int32_t>() + which * n;
    for (int64_t p = 0; p < n; ++p) {
      values[points.original[p]] = value[p];
      indices[points.original[p]] = index[p] == kNobody ? -1 : index[p];
    }
  };
  unpack(0, best.positive, best.positive_index);
  unpack(1, best.negative, best.negative_index);
  return side;
}

SideExtremes nothing_found(int64_t rows, const at::TensorOptions& options) {
  return {at::full({2, rows}, std::numeric_limits<double>::quiet_NaN(), options), at::full({2, rows}, -1, at::kInt)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_hard_extremes(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
    const at::Tensor& center, std::string_view distance) {
  constexpr const char* function = "batch_hard_extremes";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  check_center(function, center, embeddings);
  const Distance d = distance_from(function, distance);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, d, {Center::both, center.contiguous()});
    const at::Tensor half_norm = at::empty({pairs.rows.count}, pairs.rows.panel_buffer.options());
    for (int64_t p = 0; p < pairs.rows.count; ++p)
      half_norm.template mutable_data_ptr<T>()[pairs.rows.original[p]] = pairs.rows.half_norm[p];
    SideExtremes row_side = nothing_found(pairs.rows.count, half_norm.options());
    SideExtremes reference_side = nothing_found(pairs.references.count, half_norm.options());
    if (pairs.finite) {
      const Found<T> found = search(kernels, pairs, ref.has_value());
      row_side = by_row(found.rows, pairs.rows);
      if (ref) reference_side = by_row(found.columns, pairs.references);
    }
    return std::tuple(row_side.half_squares, row_side.indices, half_norm, reference_side.half_squares, reference_side.indices);
  });
}

}  // namespace

Mined mine_batch_hard(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                      const OptionalTensor& ref_labels, Distance distance) {
  return dispatch(embeddings.scalar_type(), [&](const auto& kernels) {
    return mine(kernels, embeddings, labels, ref_embeddings, ref_labels, distance);
  });
}

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) {
  m.impl("batch_hard_mine", batch_hard_mine);
  m.impl("batch_hard_extremes", batch_hard_extremes);
}

}  // namespace deepsim::cpu
