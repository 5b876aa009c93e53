// k nearest neighbours on CUDA, the torch side.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../nearest_neighbors.h"
#include "all_pairs_kernel.h"

namespace deepsim::cuda {
namespace {

std::tuple<at::Tensor, at::Tensor> nearest_neighbors(const at::Tensor& queries, const OptionalTensor& gallery, int64_t k,
                                                     std::string_view distance) {
  const Distance d = check_nearest_neighbors(queries, gallery, k, distance);
  TORCH_CHECK_VALUE(k <= kMostNeighbors, "nearest_neighbors: k must be at most ", kMostNeighbors, " on CUDA, got ", k);
  const c10::DeviceGuard guard(queries.device());
  const OwnedBatch b = own(queries, gallery, d);
  void* stream = current_stream(b.x);
  prepare(b, stream);
  const int64_t n = queries.size(0);
  at::Tensor distances = at::empty({n, k}, queries.options().dtype(compute_type(queries.scalar_type())));
  at::Tensor indices = at::empty({n, k}, queries.options().dtype(at::kLong));
  void* out = distances.mutable_data_ptr();
  int64_t* index = indices.mutable_data_ptr<int64_t>();
  const OwnedPairs pairs = centred_pairs(b, stream);
  const auto choose = [&](const Stripe& stripe) {
    const Stage stage("rows");
    nearest_rows(pairs.view, stripe, k, out, index, stream);
  };
  for_each_stripe(b, pairs.view, Pull::none, stream, choose, true);
  nobody_near(b.view, k, out, index, stream);
  return {distances, indices};
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) { m.impl("nearest_neighbors", nearest_neighbors); }

}  // namespace deepsim::cuda
