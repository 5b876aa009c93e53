// The semi-hard triplet loss as an op: one negative for every ordered pair of an anchor and a positive.
#include <torch/library.h>

#include <string_view>

#include "common/scale_gradients.h"

namespace deepsim {

constexpr char kBatchSemiHardBackward[] = "batch_semi_hard_triplet_loss_backward";

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // Results as of batch_all_triplet_loss.
  m.def(
      "batch_semi_hard_triplet_loss(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, float margin,"
      " bool soft, str distance, str reduction, bool with_gradient, bool with_ref_gradient)"
      " -> (Tensor loss, Tensor counts, Tensor means, Tensor grad_embeddings, Tensor grad_ref_embeddings)");
  m.def(
      "batch_semi_hard_triplet_loss_backward(Tensor grad_loss, Tensor grad, Tensor grad_ref, Tensor embeddings, Tensor labels,"
      " Tensor? ref_embeddings, Tensor? ref_labels, float margin, bool soft, str distance, str reduction)"
      " -> (Tensor grad_embeddings, Tensor grad_ref_embeddings)");
}

TORCH_LIBRARY_IMPL(deepsim_ext, CompositeExplicitAutograd, m) {
  m.impl(kBatchSemiHardBackward, scale_gradients<kBatchSemiHardBackward, double, bool, std::string_view, std::string_view>);
}

}  // namespace deepsim
