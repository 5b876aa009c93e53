// What losses over all pairs of a batch share on the CPU: the walk over squares, and what they return.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include <vector>

#include "../common/stage.h"
#include "packed_pairs.h"
#include "positive_lists.h"
#include "rounds.h"

namespace deepsim::cpu {

// Blocks that the panels [first, last) of one side are cut into, as even as can be.
struct Blocks {
  int64_t first, last, count;

  int64_t begin(int64_t block) const { return first + (last - first) * block / count; }
};

// By the shape alone: two blocks of a square and their gradients should stay in L2, and rounds of 8 squares, or a multiple, share out
// evenly among 2, 4 or 8 threads.
template <class T>
Blocks blocks_of(const PackedPairs<T>& pairs, int64_t first, int64_t last) {
  constexpr int64_t kBlockBytes = 128 * 1024, kMostPanels = 4, kCommonCount = 16;
  const int64_t panels = last - first, panel_bytes = pairs.panel_rows * pairs.rows.view.depth * int64_t(sizeof(T));
  const int64_t most = std::clamp<int64_t>(kBlockBytes / panel_bytes, 1, kMostPanels);
  const int64_t count = (panels + most * kCommonCount - 1) / (most * kCommonCount) * kCommonCount;
  return {first, last, std::min(panels, count)};
}

// Calls run(tiles, sums) for every square of the pairs of a stripe's anchors, with exclusive use of its rows and columns and of its row
// block's sums. Returns these. Only a stripe of all rows is symmetric: the lists of both ends of a pair are needed for that.
template <class Sums, class T, class Run>
std::vector<Sums> over_squares(const PackedPairs<T>& pairs, const Stripe& stripe, Run run) {
  const Stage stage("tiles");
  const bool symmetric = pairs.symmetric && is_all(pairs, stripe);
  const Blocks rows = blocks_of(pairs, stripe.begin, stripe.end), columns = blocks_of(pairs, 0, pairs.columns().panels);
  const Rounds rounds(rows.count, columns.count, symmetric);
  std::vector<Sums> sums(rows.count);
  rounds.for_each([&](int64_t i, int64_t j) {
    TileBlock<T> tiles = pairs.tiles(rows.begin(i), rows.begin(i + 1), columns.begin(j), columns.begin(j + 1));
    tiles.symmetric = symmetric;
    run(tiles, sums[i]);
  });
  return sums;
}

// The same for what leaves no sums: run(tiles).
template <class T, class Run>
void over_squares(const PackedPairs<T>& pairs, const Stripe& stripe, Run run) {
  struct Nothing {};
  over_squares<Nothing>(pairs, stripe, [&](const TileBlock<T>& tiles, Nothing&) { run(tiles); });
}

// Sums over the rows of a stripe, add(p, sums) those of packed row p: panel by panel, so that no number of threads makes a difference.
template <class Sums, class T, class Add>
Sums sum_over_rows(const PackedPairs<T>& pairs, const Stripe& stripe, Add add) {
  std::vector<Sums> sums(stripe.end - stripe.begin);
  at::parallel_for(stripe.begin, stripe.end, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, last] = row_range(pairs, {i, i + 1});
      for (int64_t p = first; p < last; ++p) add(p, sums[i - stripe.begin]);
    }
  });
  Sums total;
  for (const Sums& s : sums) total += s;
  return total;
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

// Whose gradients are wanted; in the self form `of_references` does not matter.
struct Wanted {
  bool gradient, of_references;
};

// What comes of a NaN or inf in the input.
template <class T>
LossWithGradient not_finite(const at::Tensor& x, const OptionalTensor& ref, const std::vector<int64_t>& counts, Wanted wanted) {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  LossWithGradient result = loss_with_gradient<T>(x, nan, counts, {nan, nan});
  if (!wanted.gradient) return result;
  result.grad = at::full({x.size(0), x.size(1)}, nan, result.loss.options());
  if (ref && wanted.of_references) result.grad_ref = at::full({ref->size(0), x.size(1)}, nan, result.loss.options());
  return result;
}

inline double ratio(double sum, int64_t count) { return count > 0 ? sum / double(count) : 0; }

}  // namespace deepsim::cpu
