// Semi-hard negatives of a block of rows, for anchors that bring the distances of their positives, as an op.
#include <torch/library.h>

namespace deepsim {

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // For anchor a and t in [begin[a], begin[a + 1]) the nearest row of another label that is farther than positives[t]: its distance, inf
  // where there is none, and its index, -1; for every anchor the farthest row of another label, -inf and -1. The lowest index on ties.
  // Distances in the type of the arithmetic, that of `positives`, and int32. NaN and -1 throughout where rows cannot be compared or a
  // positive is NaN. A positive of -1 asks for the nearest of all.
  // center: float64 [D], what rows are shifted by before their distances are taken, for cosine distance 0 where any block has a zero row;
  // None: by their means. With the same centre a pair of rows has the same distance, to the last bit, in every block.
  m.def(
      "semi_hard_negatives(Tensor embeddings, Tensor labels, Tensor ref_embeddings, Tensor ref_labels, Tensor begin,"
      " Tensor positives, Tensor? center, str distance)"
      " -> (Tensor nearest, Tensor nearest_index, Tensor farthest, Tensor farthest_index)");
}

}  // namespace deepsim
