// Batch-all triplet loss on the CPU: sort every anchor's positives by distance, count over all tiles how many of them each negative is
// active with, pull the rows accordingly.
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "../batch_hard.h"
#include "../common/sum_reduction.h"
#include "active_negatives.h"
#include "capability.h"

namespace deepsim::cpu {
namespace {

// Over positives; counts of pairs are exact, those of tiles have gone through T.
struct BatchAllPositives {
  double limits = 0, d_ap = 0, active = 0;

  void operator+=(const BatchAllPositives& other) {
    limits += other.limits;
    d_ap += other.d_ap;
    active += other.active;
  }
};

template <class T>
LossWithGradient batch_all_forward(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
                                   const OptionalTensor& ref_labels, double margin, bool semi_hard, Distance distance,
                                   SumReduction reduction, Wanted wanted) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, distance);
  int64_t valid_anchors = 0, triplets = 0;
  for (int64_t p = 0; p < pairs.rows.count; ++p) {
    valid_anchors += pairs.positive_count(p) > 0 && pairs.negative_count(p) > 0;
    triplets += pairs.positive_count(p) * pairs.negative_count(p);
  }
  if (!pairs.finite) return not_finite<T>(x, ref, {valid_anchors, semi_hard ? 0 : triplets, 0}, wanted);

  const std::vector<Stripe> stripes = stripes_of(pairs);
  const GatheredGradient<T> gathered(pairs, pairs.symmetric && stripes.size() <= 1, wanted);
  PairGradients<T> gradients(kernels, pairs, x, ref, distance, wanted);
  BatchAllSums sums;
  BatchAllPositives positives;
  for (const Stripe& stripe : stripes) {
    PositiveLists<T> lists = positive_lists(kernels, pairs, stripe, distance);
    const std::vector<T> active = active_negatives(kernels, pairs, lists, margin, semi_hard, distance, sums, gathered);
    const auto d_ap = [&](int64_t p, int64_t s) { return lists.distance[lists.at(p, s)]; };
    const auto count = [&](int64_t p, int64_t s) { return active[lists.at(p, s)]; };
    positives += sum_over_rows<BatchAllPositives>(pairs, stripe, [&](int64_t p, BatchAllPositives& sum) {
      for (int64_t s = 0; s < pairs.positive_count(p); ++s) {
        const double d = double(d_ap(p, s)), n = double(count(p, s));
        sum.limits += n * (d + margin);
        sum.active += n;
        sum.d_ap += d * (semi_hard ? n : double(pairs.negative_count(p)));
      }
    });
    gradients.add_positives(stripe, d_ap, count, false);
  }
  if (!std::isfinite(sums.active_d_an)) return not_finite<T>(x, ref, {valid_anchors, 0, 0}, wanted);  // it did not fit into T

  // Semi-hard triplets without a loss have d_ap = d_an - margin.
  if (semi_hard) positives.d_ap += sums.d_an - sums.active_d_an - double(sums.triplets - sums.active) * margin;
  triplets = semi_hard ? int64_t(positives.active) + sums.triplets - sums.active : triplets;
  const int64_t divisor = reduction == SumReduction::sum ? 1 : reduction == SumReduction::mean ? triplets : int64_t(positives.active);
  const double scale = 1 / double(std::max<int64_t>(1, divisor));
  LossWithGradient result = loss_with_gradient<T>(x, std::max(0.0, positives.limits - sums.active_d_an) * scale,
                                                  {valid_anchors, triplets, int64_t(positives.active)},
                                                  {ratio(positives.d_ap, triplets), ratio(sums.d_an, triplets)});
  gradients.finish(T(scale), gathered, T(scale), result.grad, result.grad_ref);
  return result;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_all_triplet_loss(
    const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
    double margin, bool semi_hard, std::string_view distance, std::string_view reduction, bool with_gradient, bool with_ref_gradient) {
  constexpr const char* function = "batch_all_triplet_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const SumReduction r = sum_reduction_from(function, reduction);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const LossWithGradient l = batch_all_forward<T>(kernels, x, labels, ref, ref_labels, margin, semi_hard, d, r,
                                                    {with_gradient, with_ref_gradient});
    return std::tuple(l.loss, l.counts, l.means, l.grad, l.grad_ref);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("batch_all_triplet_loss", batch_all_triplet_loss); }

}  // namespace deepsim::cpu
