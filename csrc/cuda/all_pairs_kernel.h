// Losses over all pairs on CUDA, the torch side: memory, and the walk over stripes.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <string_view>
#include <tuple>

#include "../batch_hard.h"
#include "../common/checks.h"
#include "../common/stage.h"
#include "../common/sum_reduction.h"
#include "all_pairs.h"
#include "backend.h"
#include "owned_batch.h"

namespace deepsim::cuda {

// Pairs and the tensors that their pointers point into.
struct OwnedPairs {
  at::Tensor anchors, references, anchor_norms, reference_norms;
  Pairs view;
};

// Norms, where distances need them; and where there are no distances to show it, whether the rows are finite.
inline void prepare(const OwnedBatch& b, void* stream) {
  if (b.view.distance == Distance::cosine || b.x.size(0) == 0 || b.ref.size(0) == 0) row_norms(b.view, stream);
}

// As tensor cores take them; in float64, or without a pair, as they are. After `prepare`.
inline OwnedPairs centred_pairs(const OwnedBatch& b, void* stream) {
  OwnedPairs p;
  static_cast<Batch&>(p.view) = b.view;
  p.view.centred_anchors = p.view.centred_references = {};
  if (b.view.storage == Storage::float64 || b.x.size(0) == 0 || b.ref.size(0) == 0) return p;
  const Stage stage("centre");
  const auto options = b.x.options().dtype(at::kFloat);
  const auto make = [&](const at::Tensor& x, at::Tensor& rows, at::Tensor& norms) {
    rows = at::empty({x.size(0), (x.size(1) + 3) / 4 * 4}, options);
    norms = at::empty({x.size(0)}, options);
    return CentredRows{rows.mutable_data_ptr<float>(), rows.size(1), norms.mutable_data_ptr<float>()};
  };
  p.view.centred_anchors = make(b.x, p.anchors, p.anchor_norms);
  p.view.centred_references = b.view.self_form ? p.view.centred_anchors : make(b.ref, p.references, p.reference_norms);
  OwnedCentre centre;
  centre_rows(p.view, centre.make(b), stream);
  return p;
}

// Distances of a stripe and as many strengths, if there are any: 32 MiB in float32, or a tile of rows.
constexpr int64_t kStripeElements = int64_t(1) << 23;
constexpr int64_t kStripeRows = 64;  // a multiple of, but for the last

// Which pairs have a weight in a loss whose gradient is wanted.
enum class Pull { none, few, all };

// Calls run(stripe) for one stripe of anchors after another, its distances filled in, `approximate` ones where rows are centred. None
// where there is no pair.
template <class Run>
void for_each_stripe(const OwnedBatch& b, const Pairs& pairs, Pull which, void* stream, Run run, bool approximate = false) {
  const int64_t anchors = b.x.size(0), references = b.ref.size(0);
  if (anchors == 0 || references == 0) return;
  Stripe stripe = {};
  stripe.stride = (references + kStripeColumns - 1) / kStripeColumns * kStripeColumns;
  const int64_t row_elements = stripe.stride * (which == Pull::none ? 1 : 2);
  const int64_t rows = std::min(anchors, std::max<int64_t>(1, kStripeElements / row_elements / kStripeRows) * kStripeRows);
  const auto options = b.x.options().dtype(compute_type(b.x.scalar_type()));
  const at::Tensor distances = at::empty({rows, stripe.stride}, options);
  stripe.distances = distances.mutable_data_ptr();
  at::Tensor strengths, sums, single, least;
  if (approximate && pairs.centred_anchors.rows) {
    least = at::empty({rows, stripe.stride / kStripeColumns}, options);
    stripe.least = least.mutable_data_ptr<float>();
  }
  if (which != Pull::none) {
    strengths = at::empty_like(distances);
    (which == Pull::all ? stripe.strengths : stripe.single_strengths) = strengths.mutable_data_ptr();
  }
  if (pairs.centred_anchors.rows && which == Pull::all) {
    sums = at::empty({rows + references}, options);
    stripe.anchor_sums = sums.mutable_data_ptr<float>();
    stripe.reference_sums = sums.mutable_data_ptr<float>() + rows;
    stripe.single_strengths = stripe.distances;
  }
  if (stripe.single_strengths) {
    single = at::empty({rows, stripe.stride / 32}, options.dtype(at::kInt));
    stripe.single = reinterpret_cast<uint32_t*>(single.mutable_data_ptr<int32_t>());
  }
  for (; stripe.first < anchors; stripe.first += rows) {
    stripe.rows = std::min(rows, anchors - stripe.first);
    {
      const Stage stage("tiles");
      stripe_distances(pairs, stripe, stream);
    }
    run(stripe);
  }
}

using LossWithGradient = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// (loss, counts, means, grad, grad_ref). run_rows(pairs, stripe, scales, sums, stream) launches the row kernel; finish(sums, outputs,
// stream) makes the loss of its sums. Scales are those of the outputs where `scaled_rows`: then rows are summed before their gradient is
// formed.
template <class RunRows, class Finish>
LossWithGradient loss_over_stripes(const OwnedBatch& b, int64_t counts, Pull which, bool with_ref_gradient, bool scaled_rows,
                                   RunRows run_rows, Finish finish) {
  void* stream = current_stream(b.x);
  prepare(b, stream);
  const OwnedPairs owned = centred_pairs(b, stream);
  const Pairs& pairs = owned.view;
  const bool with_gradient = which != Pull::none, of_references = with_gradient && with_ref_gradient && !b.view.self_form;
  const int64_t anchors = b.x.size(0), references = b.ref.size(0), depth = b.x.size(1);
  const auto options = b.x.options().dtype(compute_type(b.x.scalar_type()));
  const at::Tensor row_sums = at::zeros({anchors, int64_t(sizeof(RowSums) / sizeof(int64_t))}, b.x.options().dtype(at::kLong));
  RowSums* sums = reinterpret_cast<RowSums*>(row_sums.mutable_data_ptr<int64_t>());
  at::Tensor loss = at::empty({}, options), count = at::empty({counts}, options.dtype(at::kLong)), means = at::empty({2}, options);
  const at::Tensor scales = at::empty({2}, options.dtype(at::kDouble));
  double* scale = scales.mutable_data_ptr<double>();
  const LossOutputs out{loss.mutable_data_ptr(), count.mutable_data_ptr<int64_t>(), means.mutable_data_ptr(), scale};

  const auto run = [&](const Stripe& stripe, const double* scales) {
    const Stage stage("rows");
    run_rows(pairs, stripe, scales, sums, stream);
  };
  const bool sums_first = with_gradient && scaled_rows;
  if (sums_first) {
    for_each_stripe(b, pairs, Pull::none, stream, [&](const Stripe& stripe) { run(stripe, nullptr); });
    finish(sums, out, stream);
  }
  at::Tensor grad = at::zeros({with_gradient ? anchors : 0, depth}, options);
  at::Tensor grad_ref = at::zeros({of_references ? references : 0, depth}, options);
  const auto pull_together = [&](const Stripe& stripe, bool of_anchors, at::Tensor& gradient) {
    const Stage stage("gradient");
    void* to = gradient.mutable_data_ptr();
    if (stripe.single) pull_singles(pairs, stripe, of_anchors, to, stream);
    if (!stripe.strengths) return;
    const int splits = pull_splits(pairs, stripe, of_anchors);
    const at::Tensor partial = at::empty({splits > 1 ? splits : 0, of_anchors ? stripe.rows : references, depth}, options);
    pull(pairs, stripe, of_anchors, splits, partial.mutable_data_ptr(), to, stream);
  };
  for_each_stripe(b, pairs, which, stream, [&](const Stripe& stripe) {
    run(stripe, sums_first ? scale : nullptr);
    if (!with_gradient) return;
    pull_together(stripe, true, grad);
    if (b.view.self_form || of_references) pull_together(stripe, false, b.view.self_form ? grad : grad_ref);
  });
  if (!sums_first) finish(sums, out, stream);
  if (with_gradient) {
    finish_gradient(pairs, true, scaled_rows ? nullptr : scale, grad.mutable_data_ptr(), stream);
    if (of_references) finish_gradient(pairs, false, scaled_rows ? nullptr : scale, grad_ref.mutable_data_ptr(), stream);
  }
  return {loss, count, means, grad, grad_ref};
}

// An op whose loss is of triplets: run_rows(pairs, stripe, sums, stream) launches its row kernel.
template <class RunRows>
LossWithGradient triplet_loss_over_stripes(const char* function, const at::Tensor& embeddings, const at::Tensor& labels,
                                           const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
                                           std::string_view distance, std::string_view reduction, Pull which, bool with_ref_gradient,
                                           RunRows run_rows) {
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const SumReduction r = sum_reduction_from(function, reduction);
  const c10::DeviceGuard guard(embeddings.device());
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, d);
  return loss_over_stripes(
      b, 3, which, with_ref_gradient, false,
      [&](const Pairs& pairs, const Stripe& stripe, const double*, RowSums* sums, void* stream) { run_rows(pairs, stripe, sums, stream); },
      [&](const RowSums* sums, const LossOutputs& out, void* stream) { finish_triplets(b.view, sums, r, out, stream); });
}

}  // namespace deepsim::cuda
