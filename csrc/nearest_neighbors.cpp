// The k nearest neighbours of embedding rows as an op.
#include <torch/library.h>

namespace deepsim {

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // distances [Q, k] ascending, in the type of the arithmetic, and indices int64 [Q, k]; NaN and -1 throughout where an input is NaN or inf.
  // Without a gallery the queries are their own, and no row is its own neighbour.
  m.def(
      "nearest_neighbors(Tensor queries, Tensor? gallery, int k, str distance) -> (Tensor distances, Tensor indices)");
}

}  // namespace deepsim
