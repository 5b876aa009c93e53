// Semi-hard triplet loss on the CPU: sort every anchor's positives, find over all tiles the next farther negative of each, measure the
// chosen pairs, gather the gradient.
#include <torch/library.h>

#include <tuple>

#include "../batch_hard.h"
#include "../common/stage.h"
#include "../common/sum_reduction.h"
#include "../common/triplet_loss.h"
#include "all_pairs.h"
#include "capability.h"
#include "farther_negatives.h"

namespace deepsim::cpu {
namespace {

// One triplet for every ordered pair of a valid anchor and a positive, rows as the input numbers them.
struct Triplets {
  std::vector<int32_t> anchor, positive, negative;

  int64_t size() const { return int64_t(anchor.size()); }
};

template <class T>
Triplets mine_semi_hard(const Kernels<T>& kernels, const PackedPairs<T>& pairs, Distance distance) {
  PositiveLists<T> lists = positive_lists(kernels, pairs, distance);
  const std::vector<int32_t> slot = sort_descending(lists);
  const FartherNegatives<T> negatives = farther_negatives(kernels, pairs, lists, distance);

  Triplets triplets;
  for (int64_t p = 0; p < pairs.rows.count; ++p) {
    if (pairs.negative_count(p) == 0) continue;
    for (int64_t s = 0; s < pairs.positive_count(p); ++s) {
      const int64_t at = lists.at(p, s);
      TORCH_INTERNAL_ASSERT(negatives.has_nearest(at) || negatives.has_farthest(p));
      triplets.anchor.push_back(pairs.rows.original[p]);
      triplets.positive.push_back(pairs.columns().original[positive_column(pairs, p, slot[at])]);
      triplets.negative.push_back(negatives.has_nearest(at) ? negatives.nearest_index[at] : negatives.farthest_index[p]);
    }
  }
  return triplets;
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
                                   SumReduction reduction, bool with_gradient) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, distance);
  int64_t valid_anchors = 0;
  for (int64_t p = 0; p < pairs.rows.count; ++p) valid_anchors += pairs.positive_count(p) > 0 && pairs.negative_count(p) > 0;
  if (!pairs.finite) return not_finite<T>(x, ref, {valid_anchors, 0, 0}, with_gradient);

  const Triplets triplets = mine_semi_hard(kernels, pairs, distance);
  const at::Tensor& others = ref ? *ref : x;
  std::vector<T> d_ap(triplets.size()), d_an(triplets.size()), weight(triplets.size());
  {
    const Stage stage("recompute");
    at::parallel_for(0, triplets.size(), row_grain(x.size(1)), [&](int64_t begin, int64_t end) {
      const Rows rows = rows_of(x), columns = rows_of(others);
      kernels.pair_distances(rows, columns, triplets.anchor.data(), triplets.positive.data(), distance, begin, end, d_ap.data());
      kernels.pair_distances(rows, columns, triplets.anchor.data(), triplets.negative.data(), distance, begin, end, d_an.data());
    });
  }
  double sum = 0, sum_ap = 0, sum_an = 0;
  int64_t active = 0;
  for (int64_t t = 0; t < triplets.size(); ++t) {
    const T value = loss.value(d_ap[t], d_an[t]);
    sum += double(value);
    active += value > 0;
    sum_ap += double(d_ap[t]);
    sum_an += double(d_an[t]);
  }
  const int64_t divisor = reduction == SumReduction::sum ? 1 : reduction == SumReduction::mean ? triplets.size() : active;
  const double scale = 1 / double(std::max<int64_t>(1, divisor));
  LossWithGradient result = loss_with_gradient<T>(x, sum * scale, {valid_anchors, triplets.size(), active},
                                                  {ratio(sum_ap, triplets.size()), ratio(sum_an, triplets.size())});
  if (!with_gradient) return result;

  for (int64_t t = 0; t < triplets.size(); ++t) weight[t] = T(scale) * loss.derivative(d_ap[t], d_an[t]);
  const std::vector<int32_t> row_position = packed_positions(pairs.rows);
  const std::vector<int32_t> reference_position = ref ? packed_positions(pairs.references) : std::vector<int32_t>();
  const std::vector<int32_t>& column_position = ref ? reference_position : row_position;
  const auto anchors = [&](auto emit) {
    for (int64_t t = 0; t < triplets.size(); ++t) {
      emit(row_position[triplets.anchor[t]], triplets.positive[t], d_ap[t], weight[t]);
      emit(row_position[triplets.anchor[t]], triplets.negative[t], d_an[t], -weight[t]);
    }
  };
  const auto chosen = [&](auto emit) {
    for (int64_t t = 0; t < triplets.size(); ++t) {
      emit(column_position[triplets.positive[t]], triplets.anchor[t], d_ap[t], weight[t]);
      emit(column_position[triplets.negative[t]], triplets.anchor[t], d_an[t], -weight[t]);
    }
  };
  const auto finish = [&](const at::Tensor& side, const PackedPoints<T>& points, const at::Tensor& other,
                          const PackedPoints<T>& other_points, const PairLists<T>& lists) {
    return finish_gradient<T>(kernels, side, points, other, other_points, nullptr, T(0), lists, distance);
  };
  if (ref) {
    result.grad = finish(x, pairs.rows, others, pairs.references, pair_lists<T>(pairs.rows.count, anchors));
    result.grad_ref = finish(others, pairs.references, x, pairs.rows, pair_lists<T>(pairs.references.count, chosen));
  } else {
    const auto all = [&](auto emit) {
      anchors(emit);
      chosen(emit);
    };
    result.grad = finish(x, pairs.rows, x, pairs.rows, pair_lists<T>(pairs.rows.count, all));
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_semi_hard_triplet_loss(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
    double margin, bool soft, std::string_view distance, std::string_view reduction, bool with_gradient) {
  constexpr const char* function = "batch_semi_hard_triplet_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const SumReduction r = sum_reduction_from(function, reduction);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const LossWithGradient l =
        semi_hard_forward<T>(kernels, x, labels, ref, ref_labels, {T(margin), soft}, d, r, with_gradient);
    return std::tuple(l.loss, l.counts, l.means, l.grad, l.grad_ref);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("batch_semi_hard_triplet_loss", batch_semi_hard_triplet_loss); }

}  // namespace deepsim::cpu
