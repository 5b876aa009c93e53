// Contrastive loss of all pairs on the CPU: positives from their lists, negatives tile by tile.
#include <torch/library.h>

#include <tuple>

#include "../batch_hard.h"
#include "../common/sum_reduction.h"
#include "../common/triplet_loss.h"
#include "capability.h"
#include "pair_gradient.h"

namespace deepsim::cpu {
namespace {

struct ContrastiveOptions {
  double pos_margin, neg_margin;
  bool squared;
  Distance distance;
  SumReduction reduction;
};

struct ContrastivePositives {
  double loss = 0, distance = 0;
  int64_t active = 0;

  void operator+=(const ContrastivePositives& other) {
    loss += other.loss;
    distance += other.distance;
    active += other.active;
  }
};

template <class T>
LossWithGradient contrastive_forward(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
                                     const OptionalTensor& ref_labels, const ContrastiveOptions& options, Wanted wanted) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, options.distance);
  int64_t positive_pairs = 0, negative_pairs = 0;
  for (int64_t p = 0; p < pairs.rows.count; ++p) {
    positive_pairs += pairs.positive_count(p);
    negative_pairs += pairs.negative_count(p);
  }
  if (!pairs.finite) return not_finite<T>(x, ref, {positive_pairs, negative_pairs, 0, 0}, wanted);

  PairGradients<T> gradients(kernels, pairs, x, ref, options.distance, wanted);
  ContrastivePositives positives;
  for (const Stripe& stripe : stripes_of(pairs)) {
    const PositiveLists<T> lists = positive_lists(kernels, pairs, stripe, options.distance);
    const auto distance = [&](int64_t p, int64_t s) { return lists.distance[lists.at(p, s)]; };
    const auto beyond = [&](int64_t p, int64_t s) { return std::max(T(0), distance(p, s) - T(options.pos_margin)); };
    positives += sum_over_rows<ContrastivePositives>(pairs, stripe, [&](int64_t p, ContrastivePositives& sum) {
      for (int64_t s = 0; s < pairs.positive_count(p); ++s) {
        const T b = beyond(p, s);
        sum.loss += double(options.squared ? b * b : b);
        sum.distance += double(distance(p, s));
        sum.active += b > 0;
      }
    });
    const auto weight = [&](int64_t p, int64_t s) {
      const T b = beyond(p, s);
      return options.squared ? 2 * b : T(b > 0);
    };
    gradients.add_positives(stripe, distance, weight, true);
  }

  const GatheredGradient<T> gathered(pairs, pairs.symmetric, wanted);
  ContrastiveSums negatives;
  const auto count = [&](const TileBlock<T>& tiles, ContrastiveSums& sum) {
    kernels.contrastive_negatives({tiles, comparable_margin<T>(options.neg_margin), options.squared, options.distance,
                                   gathered.row_data(), gathered.column_data()},
                                  sum);
  };
  for (const ContrastiveSums& s : over_squares<ContrastiveSums>(pairs, all_panels(pairs), count)) {
    negatives.active += s.active;
    negatives.loss += s.loss;
    negatives.distance += s.distance;
  }
  if (negatives.active > 0 && is_beyond_comparison<T>(options.neg_margin))
    negatives.loss = std::numeric_limits<double>::infinity();  // as it would be in T

  const auto scale = [&](int64_t active) {
    const int64_t divisor = options.reduction == SumReduction::sum    ? 1
                            : options.reduction == SumReduction::mean ? positive_pairs + negative_pairs
                                                                      : active;
    return 1 / double(std::max<int64_t>(1, divisor));
  };
  const double positive_scale = scale(positives.active), negative_scale = scale(negatives.active);
  LossWithGradient result = loss_with_gradient<T>(x, positives.loss * positive_scale + negatives.loss * negative_scale,
                                                  {positive_pairs, negative_pairs, positives.active, negatives.active},
                                                  {ratio(positives.distance, positive_pairs), ratio(negatives.distance, negative_pairs)});
  gradients.finish(T(positive_scale), gathered, T(negative_scale), result.grad, result.grad_ref);
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_contrastive_loss(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
    double pos_margin, double neg_margin, bool squared, std::string_view distance, std::string_view reduction, bool with_gradient,
    bool with_ref_gradient) {
  constexpr const char* function = "batch_contrastive_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const ContrastiveOptions options{pos_margin, neg_margin, squared, distance_from(function, distance),
                                   sum_reduction_from(function, reduction)};
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const LossWithGradient l =
        contrastive_forward<T>(kernels, x, labels, ref, ref_labels, options, {with_gradient, with_ref_gradient});
    return std::tuple(l.loss, l.counts, l.means, l.grad, l.grad_ref);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("batch_contrastive_loss", batch_contrastive_loss); }

}  // namespace deepsim::cpu
