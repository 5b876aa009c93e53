// Distances of all pairs of a label as tiles have them, as an op: what lists of positives are made of.
#include <torch/library.h>

namespace deepsim {

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // Of every row of the embeddings and every row of its label in the reference set or, without one, every other row of its label: [P], in the
  // type of the arithmetic, ascending by row, then by the other row. NaN throughout where rows cannot be compared. center: as of
  // semi_hard_negatives; rows that are equal to the last bit have distances that are.
  m.def(
      "positive_distances(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels, Tensor? center, str distance)"
      " -> Tensor");
}

}  // namespace deepsim
