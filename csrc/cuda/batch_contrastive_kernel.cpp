// Contrastive loss of all pairs on CUDA, the torch side.
#include <torch/library.h>

#include "all_pairs_kernel.h"

namespace deepsim::cuda {
namespace {

LossWithGradient batch_contrastive_loss(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                                        const OptionalTensor& ref_labels, double pos_margin, double neg_margin, bool squared,
                                        std::string_view distance, std::string_view reduction, bool with_gradient, bool with_ref_gradient) {
  constexpr const char* function = "batch_contrastive_loss";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Distance d = distance_from(function, distance);
  const SumReduction r = sum_reduction_from(function, reduction);
  const PairMargins margins{pos_margin, neg_margin, squared};
  const c10::DeviceGuard guard(embeddings.device());
  const OwnedBatch b = own(embeddings, labels, ref_embeddings, ref_labels, d);
  // Positives and negatives are divided by numbers of their own only in this reduction.
  const bool scaled_rows = r == SumReduction::mean_nonzero;
  return loss_over_stripes(
      b, 4, with_gradient ? Pull::all : Pull::none, with_ref_gradient, scaled_rows,
      [&](const Pairs& pairs, const Stripe& stripe, const double* scales, RowSums* sums, void* stream) {
        contrastive_rows(pairs, stripe, margins, scales, sums, stream);
      },
      [&](const RowSums* sums, const LossOutputs& out, void* stream) { finish_pairs(b.view, sums, r, margins, out, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) { m.impl("batch_contrastive_loss", batch_contrastive_loss); }

}  // namespace deepsim::cuda
