// Batch-all triplet loss on CUDA, the torch side.
#include <torch/library.h>

#include "all_pairs_kernel.h"

namespace deepsim::cuda {
namespace {

LossWithGradient batch_all_triplet_loss(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                                        const OptionalTensor& ref_labels, double margin, bool semi_hard, std::string_view distance,
                                        std::string_view reduction, bool with_gradient, bool with_ref_gradient) {
  return triplet_loss_over_stripes("batch_all_triplet_loss", embeddings, labels, ref_embeddings, ref_labels, distance, reduction,
                                   with_gradient ? Pull::all : Pull::none, with_ref_gradient,
                                   [=](const Pairs& pairs, const Stripe& stripe, RowSums* sums, void* stream) {
                                     batch_all_rows(pairs, stripe, {margin, semi_hard}, sums, stream);
                                   });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) { m.impl("batch_all_triplet_loss", batch_all_triplet_loss); }

}  // namespace deepsim::cuda
