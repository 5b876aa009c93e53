// The triplet loss of given triplets as an op.
#include <torch/library.h>

namespace deepsim {

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // anchor, positive, negative [T, D]. distances, slopes: [2, T], with the swap [3, T], d_ap, d_an and d_pn, and the derivatives of each
  // triplet's own loss by them; scale []: what the sum of losses is multiplied by. All in the type of the arithmetic.
  m.def(
      "triplet_margin_loss(Tensor anchor, Tensor positive, Tensor negative, float margin, bool swap, bool soft, str distance,"
      " str reduction) -> (Tensor loss, Tensor distances, Tensor slopes, Tensor scale)");
  // Gradients in the dtype of the rows. margin and soft are for the gradient of this gradient.
  m.def(
      "triplet_margin_loss_backward(Tensor grad_loss, Tensor distances, Tensor slopes, Tensor scale, Tensor anchor, Tensor positive,"
      " Tensor negative, float margin, bool swap, bool soft, str distance, str reduction)"
      " -> (Tensor grad_anchor, Tensor grad_positive, Tensor grad_negative)");
}

}  // namespace deepsim
