// The contrastive loss of all pairs as an op.
#include <torch/library.h>

#include <string_view>

#include "common/scale_gradients.h"

namespace deepsim {

constexpr char kBatchContrastiveBackward[] = "batch_contrastive_loss_backward";

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // Over ordered pairs. counts: positive pairs, negative pairs, and those of either with a loss > 0; means: of the positive and the
  // negative pairs' distances. The gradients are those of the loss, in its dtype, and have no rows unless with_gradient;
  // that by the references needs with_ref_gradient too.
  m.def(
      "batch_contrastive_loss(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, float pos_margin,"
      " float neg_margin, bool squared, str distance, str reduction, bool with_gradient, bool with_ref_gradient)"
      " -> (Tensor loss, Tensor counts, Tensor means, Tensor grad_embeddings, Tensor grad_ref_embeddings)");
  // The other arguments are those of the forward op, for the gradient of this gradient.
  m.def(
      "batch_contrastive_loss_backward(Tensor grad_loss, Tensor grad, Tensor grad_ref, Tensor embeddings, Tensor labels,"
      " Tensor? ref_embeddings, Tensor? ref_labels, float pos_margin, float neg_margin, bool squared, str distance, str reduction)"
      " -> (Tensor grad_embeddings, Tensor grad_ref_embeddings)");
}

TORCH_LIBRARY_IMPL(deepsim_ext, CompositeExplicitAutograd, m) {
  m.impl(kBatchContrastiveBackward, scale_gradients<kBatchContrastiveBackward, double, double, bool, std::string_view, std::string_view>);
}

}  // namespace deepsim
