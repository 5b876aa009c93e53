// Mining by strategy, and the triplet loss of what it finds, on CUDA, the torch side.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../mine_triplets.h"
#include "all_pairs_kernel.h"
#include "mined_triplets.h"

namespace deepsim::cuda {
namespace {

void mine_and_finish(const OwnedBatch& b, const Strategies& strategies, const Triplets& out, const LossOptions& options) {
  void* stream = current_stream(b.x);
  prepare(b, stream);
  const int64_t anchors = b.x.size(0), references = b.ref.size(0);
  if (references == 0) return finish_direct(b.view, {0, nullptr, nullptr}, out, options, stream);  // nobody to choose
  const at::Tensor values = at::empty({2, anchors}, b.x.options().dtype(compute_type(b.x.scalar_type())));
  const at::Tensor indices = at::empty({2, anchors}, b.x.options().dtype(at::kInt));
  const DirectFound found{1, values.mutable_data_ptr(), indices.mutable_data_ptr<int32_t>()};
  const OwnedPairs pairs = centred_pairs(b, stream);
  for_each_stripe(b, pairs.view, Pull::none, stream, [&](const Stripe& stripe) {
    const Stage stage("rows");
    mine_rows(pairs.view, stripe, strategies, found, stream);
  });
  const Stage stage("recompute");
  finish_direct(b.view, found, out, options, stream);
}

std::tuple<at::Tensor, at::Tensor> mine_triplets(const at::Tensor& embeddings, const at::Tensor& labels,
                                                 const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
                                                 std::string_view positive, std::string_view negative, std::string_view distance) {
  constexpr const char* function = "mine_triplets";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Strategies strategies = strategies_from(function, positive, negative);
  const Distance d = distance_from(function, distance);
  const c10::DeviceGuard guard(embeddings.device());
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, d);
  const MinedTriplets mined(b);
  mine_and_finish(b, strategies, mined.view, {0, false, Reduction::none});
  return {mined.positives, mined.negatives};
}

MinedLoss mined_triplet_loss(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                             const OptionalTensor& ref_labels, std::string_view positive, std::string_view negative, double margin,
                             bool soft, std::string_view distance, std::string_view reduction) {
  constexpr const char* function = "mined_triplet_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Strategies strategies = strategies_from(function, positive, negative);
  const Distance d = distance_from(function, distance);
  const LossOptions options{margin, soft, reduction_from(function, reduction)};
  const c10::DeviceGuard guard(embeddings.device());
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, d);
  const MinedTriplets mined(b, options.reduction);
  mine_and_finish(b, strategies, mined.view, options);
  return mined.result();
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) {
  m.impl("mine_triplets", mine_triplets);
  m.impl("mined_triplet_loss", mined_triplet_loss);
}

}  // namespace deepsim::cuda
