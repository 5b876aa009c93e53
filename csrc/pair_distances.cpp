// Distances of given pairs of rows and their gradient, as ops: what is left of a loss over several processes once its pairs are chosen.
#include "pair_distances.h"

#include <torch/library.h>

#include "batch_hard.h"
#include "common/checks.h"

namespace deepsim {

Distance check_pairs(const char* function, const at::Tensor& embeddings, const at::Tensor& ref_embeddings, const at::Tensor& rows,
                     const at::Tensor& ref_rows, std::string_view distance) {
  check_rows(function, "embeddings", embeddings);
  check_rows(function, "ref_embeddings", ref_embeddings);
  const at::Device device = embeddings.device();
  check_like(function, "ref_embeddings", ref_embeddings, embeddings.scalar_type(), device, {ref_embeddings.size(0), embeddings.size(1)});
  check_like(function, "rows", rows, at::kLong, device, {rows.numel()});
  check_like(function, "ref_rows", ref_rows, at::kLong, device, {rows.numel()});
  return distance_from(function, distance);
}

void check_pair_weights(const char* function, const at::Tensor& weights, const at::Tensor& distances, const at::Tensor& embeddings,
                        const at::Tensor& rows) {
  const at::ScalarType type = compute_type(embeddings.scalar_type());
  check_like(function, "weights", weights, type, embeddings.device(), rows.sizes());
  check_like(function, "distances", distances, type, embeddings.device(), rows.sizes());
}

TORCH_LIBRARY_FRAGMENT(deepsim_ext, m) {
  // [T] between embeddings[rows[t]] and ref_embeddings[ref_rows[t]] by direct differences, in the type of the arithmetic; int64 indices.
  m.def("pair_distances(Tensor embeddings, Tensor ref_embeddings, Tensor rows, Tensor ref_rows, str distance) -> Tensor");
  // Gradients of the sum of weights [T] times these distances, in the type of the arithmetic. Each row's pairs are added up in their order.
  m.def(
      "pair_distances_backward(Tensor weights, Tensor distances, Tensor embeddings, Tensor ref_embeddings, Tensor rows, Tensor ref_rows,"
      " str distance) -> (Tensor grad_embeddings, Tensor grad_ref_embeddings)");
}

}  // namespace deepsim
