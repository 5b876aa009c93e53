// The k nearest neighbours of embedding rows as an op.
#include "nearest_neighbors.h"

#include <torch/library.h>

#include <algorithm>

#include "batch_hard.h"
#include "common/checks.h"

namespace deepsim {

Distance check_nearest_neighbors(const at::Tensor& queries, const std::optional<at::Tensor>& gallery, int64_t k, std::string_view distance) {
  constexpr const char* function = "nearest_neighbors";
  check_rows(function, "queries", queries);
  if (gallery) {
    check_rows(function, "gallery", *gallery);
    check_like(function, "gallery", *gallery, queries.scalar_type(), queries.device(), {gallery->size(0), queries.size(1)});
  }
  const int64_t available = gallery ? gallery->size(0) : std::max<int64_t>(0, queries.size(0) - 1);
  TORCH_CHECK_VALUE(k >= 1 && k <= available, function, ": k must be from 1 to ", available, ", got ", k);
  return distance_from(function, distance);
}

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // distances [Q, k] ascending, in the type of the arithmetic, and indices int64 [Q, k]; NaN and -1 throughout where an input is NaN or inf.
  // Without a gallery the queries are their own, and no row is its own neighbour.
  m.def(
      "nearest_neighbors(Tensor queries, Tensor? gallery, int k, str distance) -> (Tensor distances, Tensor indices)");
}

}  // namespace deepsim
