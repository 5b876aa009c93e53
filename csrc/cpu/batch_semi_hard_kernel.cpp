// Semi-hard triplet loss on the CPU: sort every anchor's positives, find over all tiles the next farther negative of each, measure the
// chosen pairs, gather the gradient.
#include <torch/library.h>

#include <tuple>

#include "../batch_hard.h"
#include "../common/stage.h"
#include "../common/sum_reduction.h"
#include "../common/triplet_loss.h"
#include "capability.h"
#include "farther_negatives.h"
#include "pair_gradient.h"

namespace deepsim::cpu {
namespace {

// One triplet for every ordered pair of a valid anchor of a stripe and a positive: anchor by anchor, as they are packed, positives in the
// order of the columns. Rows as the input numbers them.
template <class T>
struct Triplets {
  std::vector<int64_t> begin;  // [rows + 1], where those of a packed row begin
  std::vector<int32_t> anchor, positive, negative;
  std::vector<T> d_ap, d_an, weight;  // empty until they are measured, when the lists are gone

  // Not filled yet. count(p) of packed row p.
  template <class Count>
  Triplets(int64_t rows, Count count) : begin(rows + 1) {
    for (int64_t p = 0; p < rows; ++p) begin[p + 1] = begin[p] + count(p);
    for (auto* list : {&anchor, &positive, &negative}) list->resize(size());
  }

  int64_t size() const { return begin.back(); }
};

template <class T>
Triplets<T> mine_semi_hard(const Kernels<T>& kernels, const PackedPairs<T>& pairs, const Stripe& stripe, Distance distance) {
  PositiveLists<T> lists = positive_lists(kernels, pairs, stripe, distance);
  const std::vector<int32_t> slot = sort_descending(lists);
  const FartherNegatives<T> negatives = farther_negatives(kernels, pairs, lists, distance);

  Triplets<T> triplets(pairs.rows.count, [&](int64_t p) { return pairs.negative_count(p) > 0 ? lists.length[p] : 0; });
  const auto [first, last] = row_range(pairs, stripe);
  at::parallel_for(first, last, 64, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t s = 0; s < triplets.begin[p + 1] - triplets.begin[p]; ++s) {
        const int64_t at = lists.at(p, s), t = triplets.begin[p] + slot[at];
        TORCH_INTERNAL_ASSERT(negatives.has_nearest(at) || negatives.has_farthest(p));
        triplets.anchor[t] = pairs.rows.original[p];
        triplets.positive[t] = pairs.columns().original[positive_column(pairs, p, slot[at])];
        triplets.negative[t] = negatives.has_nearest(at) ? negatives.nearest_index[at] : negatives.farthest_index[p];
      }
    }
  });
  return triplets;
}

struct TripletSums {
  int64_t count = 0, active = 0;
  double loss = 0, d_ap = 0, d_an = 0;

  void operator+=(const TripletSums& other) {
    count += other.count;
    active += other.active;
    loss += other.loss;
    d_ap += other.d_ap;
    d_an += other.d_an;
  }
};

// Distances of the chosen pairs by direct differences, and the derivative of every triplet's loss.
template <class T>
TripletSums measure(const Kernels<T>& kernels, const PackedPairs<T>& pairs, const Stripe& stripe, const Rows& rows, const Rows& columns,
                    const TripletLoss<T>& loss, Distance distance, Triplets<T>& triplets) {
  const Stage stage("recompute");
  for (auto* values : {&triplets.d_ap, &triplets.d_an, &triplets.weight}) values->resize(triplets.size());
  at::parallel_for(0, triplets.size(), row_grain(rows.depth), [&](int64_t begin, int64_t end) {
    kernels.pair_distances(rows, columns, triplets.anchor.data(), triplets.positive.data(), distance, begin, end, triplets.d_ap.data());
    kernels.pair_distances(rows, columns, triplets.anchor.data(), triplets.negative.data(), distance, begin, end, triplets.d_an.data());
  });
  return sum_over_rows<TripletSums>(pairs, stripe, [&](int64_t p, TripletSums& sum) {
    for (int64_t t = triplets.begin[p]; t < triplets.begin[p + 1]; ++t) {
      const T value = loss.value(triplets.d_ap[t], triplets.d_an[t]);
      triplets.weight[t] = loss.derivative(triplets.d_ap[t], triplets.d_an[t]);
      ++sum.count;
      sum.active += value > 0;
      sum.loss += double(value);
      sum.d_ap += double(triplets.d_ap[t]);
      sum.d_an += double(triplets.d_an[t]);
    }
  });
}

// position: of the columns, by row of the input.
template <class T>
void add_gradient(PairGradients<T>& gradients, const PackedPairs<T>& pairs, const Stripe& stripe, const Triplets<T>& triplets,
                  const std::vector<int32_t>& position) {
  // Those of a valid anchor are all of its positives; where there is no triplet, nothing is to be added.
  const auto of = [&](const std::vector<T>& values) {
    return [&](int64_t p, int64_t s) { return triplets.begin[p] == triplets.begin[p + 1] ? T(0) : values[triplets.begin[p] + s]; };
  };
  gradients.add_positives(stripe, of(triplets.d_ap), of(triplets.weight), false);
  const Stage stage("gradient");
  const auto [first, last] = row_range(pairs, stripe);
  gradients.add_to_rows(first, last, [&](int64_t p, RowPairs<T>& row) {
    for (int64_t t = triplets.begin[p]; t < triplets.begin[p + 1]; ++t)
      append(row, triplets.negative[t], triplets.d_an[t], -triplets.weight[t]);
  });
  if (!gradients.wants_columns()) return;
  const ByRow chosen(pairs.columns().count, triplets.size(), [&](int64_t t) { return position[triplets.negative[t]]; });
  gradients.add_to_columns(0, pairs.columns().count, [&](int64_t c, RowPairs<T>& column) {
    for (int64_t i = chosen.begin[c]; i < chosen.begin[c + 1]; ++i) {
      const int64_t t = chosen.element[i];
      append(column, triplets.anchor[t], triplets.d_an[t], -triplets.weight[t]);
    }
  });
}

template <class T>
std::vector<int32_t> packed_positions(const PackedPoints<T>& points) {
  std::vector<int32_t> position(points.count);
  for (int64_t p = 0; p < points.count; ++p) position[points.original[p]] = int32_t(p);
  return position;
}

template <class T>
LossWithGradient semi_hard_forward(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
                                   const OptionalTensor& ref_labels, const TripletLoss<T>& loss, Distance distance,
                                   SumReduction reduction, Wanted wanted) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, distance);
  int64_t valid_anchors = 0;
  for (int64_t p = 0; p < pairs.rows.count; ++p) valid_anchors += pairs.positive_count(p) > 0 && pairs.negative_count(p) > 0;
  if (!pairs.finite) return not_finite<T>(x, ref, {valid_anchors, 0, 0}, wanted);

  PairGradients<T> gradients(kernels, pairs, x, ref, distance, wanted);
  const std::vector<int32_t> position = packed_positions(pairs.columns());
  TripletSums sums;
  for (const Stripe& stripe : stripes_of(pairs)) {
    Triplets<T> triplets = mine_semi_hard(kernels, pairs, stripe, distance);
    sums += measure(kernels, pairs, stripe, rows_of(x), rows_of(ref ? *ref : x), loss, distance, triplets);
    if (wanted.gradient) add_gradient(gradients, pairs, stripe, triplets, position);
  }
  const int64_t divisor = reduction == SumReduction::sum ? 1 : reduction == SumReduction::mean ? sums.count : sums.active;
  const double scale = 1 / double(std::max<int64_t>(1, divisor));
  LossWithGradient result = loss_with_gradient<T>(x, sums.loss * scale, {valid_anchors, sums.count, sums.active},
                                                  {ratio(sums.d_ap, sums.count), ratio(sums.d_an, sums.count)});
  gradients.finish(T(scale), {}, T(0), result.grad, result.grad_ref);
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_semi_hard_triplet_loss(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
    double margin, bool soft, std::string_view distance, std::string_view reduction, bool with_gradient, bool with_ref_gradient) {
  constexpr const char* function = "batch_semi_hard_triplet_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const SumReduction r = sum_reduction_from(function, reduction);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const LossWithGradient l =
        semi_hard_forward<T>(kernels, x, labels, ref, ref_labels, {T(margin), soft}, d, r, {with_gradient, with_ref_gradient});
    return std::tuple(l.loss, l.counts, l.means, l.grad, l.grad_ref);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("batch_semi_hard_triplet_loss", batch_semi_hard_triplet_loss); }

}  // namespace deepsim::cpu
