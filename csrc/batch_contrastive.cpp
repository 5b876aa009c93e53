// The contrastive loss of all pairs as an op.
#include <torch/library.h>

#include <string_view>

#include "common/scale_gradients.h"

namespace deepsim {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_loss, const at::Tensor& grad, const at::Tensor& grad_ref,
                                            const at::Tensor& embeddings, const at::Tensor&, const OptionalTensor& ref_embeddings,
                                            const OptionalTensor&, double, double, bool, std::string_view, std::string_view) {
  return scale_gradients("batch_contrastive_loss_backward", grad_loss, grad, grad_ref, embeddings, ref_embeddings);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // Over ordered pairs. counts: positive pairs, negative pairs, and those of either with a loss > 0; means: of the positive and the
  // negative pairs' distances. The gradients are those of the loss, in its dtype, and have no rows unless with_gradient.
  m.def(
      "batch_contrastive_loss(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, float pos_margin,"
      " float neg_margin, bool squared, str distance, str reduction, bool with_gradient)"
      " -> (Tensor loss, Tensor counts, Tensor means, Tensor grad_embeddings, Tensor grad_ref_embeddings)");
  // The other arguments are those of the forward op, for the gradient of this gradient.
  m.def(
      "batch_contrastive_loss_backward(Tensor grad_loss, Tensor grad, Tensor grad_ref, Tensor embeddings, Tensor labels,"
      " Tensor? ref_embeddings, Tensor? ref_labels, float pos_margin, float neg_margin, bool squared, str distance, str reduction)"
      " -> (Tensor grad_embeddings, Tensor grad_ref_embeddings)");
}

TORCH_LIBRARY_IMPL(deepsim_ext, CompositeExplicitAutograd, m) { m.impl("batch_contrastive_loss_backward", backward); }

}  // namespace deepsim
