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

// Searches rows against columns, square of panels by square. A square starts from the best found so far, which saves work,
// and hands its finds back under the lock of its rows (columns); the order in which that happens cannot be seen.
template <class T>
ExtremesBuffer<T> search(const Kernels<T>& kernels, const PackedPairs<T>& pairs) {
  const Stage stage("tiles");
  const PackedPoints<T>&rows = pairs.rows, &columns = pairs.columns();
  const bool symmetric = pairs.symmetric;
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
      const TileBlock<T> tiles = pairs.tiles(i * side, std::min((i + 1) * side, rows.panels), j * side,
                                             std::min((j + 1) * side, columns.panels));
      kernels.mine({tiles, row_best.view(), both ? column_best.view() : row_best.view()});
      with_lock(i, [&](int64_t first, int64_t count) { merge(best, first, row_best, count); });
      if (both) with_lock(j, [&](int64_t first, int64_t count) { merge(best, first, column_best, count); });
      if (++j == column_blocks) j = symmetric ? ++i : (++i, 0);
    }
  });
  return best;
}

template <class T>
Mined mine(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
           const OptionalTensor& ref_labels, Distance distance) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, distance);
  return mine_packed(pairs, [&] {
    ExtremesBuffer<T> best = search(kernels, pairs);
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

}  // namespace

Mined mine_batch_hard(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                      const OptionalTensor& ref_labels, Distance distance) {
  return dispatch(embeddings.scalar_type(), [&](const auto& kernels) {
    return mine(kernels, embeddings, labels, ref_embeddings, ref_labels, distance);
  });
}

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("batch_hard_mine", batch_hard_mine); }

}  // namespace deepsim::cpu
