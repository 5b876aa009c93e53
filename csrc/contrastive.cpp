// The contrastive loss of given pairs as an op.
#include <torch/library.h>

namespace deepsim {

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // x1, x2 [T, D]; y [T] in the type of the arithmetic, in which the results are as well. distances, slopes: [1, T], and the derivatives
  // of each pair's own loss by them; scale []: what the sum of losses is multiplied by.
  m.def(
      "contrastive_loss(Tensor x1, Tensor x2, Tensor y, float margin, str reduction)"
      " -> (Tensor loss, Tensor distances, Tensor slopes, Tensor scale)");
  // Gradients in the dtype of the rows. y and margin are for the gradient of this gradient.
  m.def(
      "contrastive_loss_backward(Tensor grad_loss, Tensor distances, Tensor slopes, Tensor scale, Tensor x1, Tensor x2, Tensor y,"
      " float margin, str reduction) -> (Tensor grad_x1, Tensor grad_x2)");
}

}  // namespace deepsim
