// What a block of rows adds to the batch-all triplet loss of anchors that bring the distances of their positives, as an op.
#include <torch/library.h>

namespace deepsim {

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // Triplets of anchor a, positive t in [begin[a], begin[a + 1]) and a row of another label; semi_hard: only those with
  // d_ap < d_an <= d_ap + margin. sums, float64 [4]: how many triplets, how many with a loss > 0, and the sums of d_an over either. active:
  // for every positive how many of its triplets have a loss > 0. The gradients are those of minus the last sum, and have no rows unless
  // with_gradient. All but `sums` in the type of the arithmetic, that of `positives`; NaN throughout where rows cannot be compared, or a
  // positive is NaN or beyond half of the largest number. center: as of semi_hard_negatives.
  m.def(
      "batch_all_negatives(Tensor embeddings, Tensor labels, Tensor ref_embeddings, Tensor ref_labels, Tensor begin,"
      " Tensor positives, float margin, bool semi_hard, Tensor? center, str distance, bool with_gradient)"
      " -> (Tensor sums, Tensor active, Tensor grad_embeddings, Tensor grad_ref_embeddings)");
}

}  // namespace deepsim
