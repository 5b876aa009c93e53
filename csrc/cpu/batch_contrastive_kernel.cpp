// Contrastive loss of all pairs on the CPU: positives from their lists, negatives tile by tile.
#include <torch/library.h>

#include <tuple>

#include "../batch_hard.h"
#include "../common/sum_reduction.h"
#include "all_pairs.h"
#include "capability.h"

namespace deepsim::cpu {
namespace {

struct ContrastiveOptions {
  double pos_margin, neg_margin;
  bool squared;
  Distance distance;
  SumReduction reduction;
};

template <class T>
LossWithGradient contrastive_forward(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
                                     const OptionalTensor& ref_labels, const ContrastiveOptions& options, bool with_gradient) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, options.distance);
  int64_t positive_pairs = 0, negative_pairs = 0;
  for (int64_t p = 0; p < pairs.rows.count; ++p) {
    positive_pairs += pairs.positive_count(p);
    negative_pairs += pairs.negative_count(p);
  }
  if (!pairs.finite) return not_finite<T>(x, ref, {positive_pairs, negative_pairs, 0, 0}, with_gradient);

  const PositiveLists<T> lists = positive_lists(kernels, pairs, options.distance);
  const T pos_margin = T(options.pos_margin);
  double positive_loss = 0, d_positive = 0;
  int64_t active_positives = 0;
  for (int64_t p = 0; p < pairs.rows.count; ++p) {
    for (int64_t s = 0; s < pairs.positive_count(p); ++s) {
      const T d = lists.distance[lists.at(p, s)], beyond = d - pos_margin;
      d_positive += double(d);
      if (beyond <= 0) continue;
      ++active_positives;
      positive_loss += double(options.squared ? beyond * beyond : beyond);
    }
  }

  const GatheredGradient<T> gathered = with_gradient ? GatheredGradient<T>(pairs) : GatheredGradient<T>();
  ContrastiveSums sums;
  for (const ContrastiveSums& s : over_squares<ContrastiveSums>(pairs, [&](const TileBlock<T>& tiles, ContrastiveSums& sum) {
         kernels.contrastive_negatives(
             {tiles, comparable_margin<T>(options.neg_margin), options.squared, options.distance, gathered.row_data(), gathered.column_data()}, sum);
       })) {
    sums.active += s.active;
    sums.loss += s.loss;
    sums.distance += s.distance;
  }
  if (sums.active > 0 && is_beyond_comparison<T>(options.neg_margin))
    sums.loss = std::numeric_limits<double>::infinity();  // as it would be in T

  const auto scale = [&](int64_t active) {
    const int64_t divisor = options.reduction == SumReduction::sum    ? 1
                            : options.reduction == SumReduction::mean ? positive_pairs + negative_pairs
                                                                      : active;
    return 1 / double(std::max<int64_t>(1, divisor));
  };
  const double positive_scale = scale(active_positives), negative_scale = scale(sums.active);
  LossWithGradient result = loss_with_gradient<T>(
      x, positive_loss * positive_scale + sums.loss * negative_scale, {positive_pairs, negative_pairs, active_positives, sums.active},
      {ratio(d_positive, positive_pairs), ratio(sums.distance, negative_pairs)});
  if (!with_gradient) return result;
  const auto weight = [&](int64_t p, int64_t s) {
    const T beyond = lists.distance[lists.at(p, s)] - pos_margin;
    return beyond <= 0 ? T(0) : T(positive_scale) * (options.squared ? 2 * beyond : T(1));
  };
  result.grad = finish_gradient(kernels, x, pairs.rows, ref ? *ref : x, pairs.columns(), gathered.row_data(), T(negative_scale),
                                pairs_of_rows(pairs, lists, weight), options.distance);
  if (ref) {
    result.grad_ref = finish_gradient(kernels, *ref, pairs.references, x, pairs.rows, gathered.column_data(), T(negative_scale),
                                      pairs_of_columns(pairs, lists, weight), options.distance);
  }
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_contrastive_loss(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
    double pos_margin, double neg_margin, bool squared, std::string_view distance, std::string_view reduction, bool with_gradient) {
  constexpr const char* function = "batch_contrastive_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const ContrastiveOptions options{pos_margin, neg_margin, squared, distance_from(function, distance),
                                   sum_reduction_from(function, reduction)};
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const LossWithGradient l = contrastive_forward<T>(kernels, x, labels, ref, ref_labels, options, with_gradient);
    return std::tuple(l.loss, l.counts, l.means, l.grad, l.grad_ref);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("batch_contrastive_loss", batch_contrastive_loss); }

}  // namespace deepsim::cpu
