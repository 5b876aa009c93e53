// Batch-all triplet loss on CUDA, the torch side.
#include <torch/library.h>

#include "../batch_hard.h"
#include "../common/sum_reduction.h"
#include "all_pairs_kernel.h"

namespace deepsim::cuda {
namespace {

LossWithGradient batch_all_triplet_loss(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                                        const OptionalTensor& ref_labels, double margin, bool semi_hard, std::string_view distance,
                                        std::string_view reduction, bool with_gradient) {
  constexpr const char* function = "batch_all_triplet_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const SumReduction r = sum_reduction_from(function, reduction);
  const c10::DeviceGuard guard(embeddings.device());
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, d);
  return loss_over_stripes(
      b, 3, with_gradient, false,
      [&](const Stripe& stripe, const double*, RowSums* sums, void* stream) {
        batch_all_rows(b.view, stripe, {margin, semi_hard}, sums, stream);
      },
      [&](const RowSums* sums, const LossOutputs& out, void* stream) { finish_triplets(b.view, sums, r, out, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) { m.impl("batch_all_triplet_loss", batch_all_triplet_loss); }

}  // namespace deepsim::cuda
