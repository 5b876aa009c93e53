// Distances of listed pairs on CUDA, the torch side.
#include "pair_distances.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <utility>

#include "../common/checks.h"
#include "../common/stage.h"
#include "../pair_distances.h"
#include "backend.h"
#include "owned_batch.h"
#include "sorted.h"

namespace deepsim::cuda {
namespace {

// Kernels count them in 32 bits.
void check_count(const char* function, const at::Tensor& rows) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(rows.size(0) <= kMost, function, ": rows must be at most ", kMost, " on CUDA, got ", rows.size(0));
}

at::Tensor pair_distances(const at::Tensor& embeddings, const at::Tensor& ref_embeddings, const at::Tensor& rows,
                          const at::Tensor& ref_rows, std::string_view distance) {
  constexpr const char* function = "pair_distances";
  const Distance d = check_pairs(function, embeddings, ref_embeddings, rows, ref_rows, distance);
  check_count(function, rows);
  const Stage stage("distances");
  const c10::DeviceGuard guard(embeddings.device());
  const at::Tensor x = with_adjacent_columns(embeddings), ref = with_adjacent_columns(ref_embeddings);
  const at::Tensor row = rows.contiguous(), ref_row = ref_rows.contiguous();
  Batch batch = {};
  batch.storage = storage_of(x.scalar_type());
  batch.distance = d;
  batch.anchors = rows_of(x);
  batch.references = rows_of(ref);
  at::Tensor result = at::empty({rows.size(0)}, x.options().dtype(compute_type(x.scalar_type())));
  const ListedPairs pairs{row.const_data_ptr<int64_t>(), ref_row.const_data_ptr<int64_t>(), rows.size(0)};
  measure_pairs(batch, pairs, result.mutable_data_ptr(), current_stream(x));
  return result;
}

// By the batch's anchors, of which pair t has row rows[t].
at::Tensor gradient_by_anchors(const Batch& batch, const at::Tensor& rows, const at::Tensor& ref_rows, const at::Tensor& distances,
                               const at::Tensor& weights, void* stream) {
  const auto [sorted_rows, order] = sorted<int64_t>(rows, stream);
  at::Tensor grad = at::empty({batch.anchors.count, batch.anchors.depth}, distances.options());
  pair_gradient({batch, sorted_rows.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(), ref_rows.const_data_ptr<int64_t>(),
                 distances.const_data_ptr(), weights.const_data_ptr(), rows.size(0), grad.mutable_data_ptr()},
                stream);
  return grad;
}

std::tuple<at::Tensor, at::Tensor> pair_distances_backward(const at::Tensor& weights, const at::Tensor& distances,
                                                           const at::Tensor& embeddings, const at::Tensor& ref_embeddings,
                                                           const at::Tensor& rows, const at::Tensor& ref_rows,
                                                           std::string_view distance) {
  constexpr const char* function = "pair_distances_backward";
  const Distance d = check_pairs(function, embeddings, ref_embeddings, rows, ref_rows, distance);
  check_count(function, rows);
  check_pair_weights(function, weights, distances, embeddings, rows);
  const Stage stage("backward");
  const c10::DeviceGuard guard(embeddings.device());
  void* stream = current_stream(embeddings);
  const OwnedBatch b = own(embeddings, ref_embeddings, d);
  if (d == Distance::cosine) row_norms(b.view, stream);
  // The batch as the references see it.
  Batch swapped = b.view;
  std::swap(swapped.anchors, swapped.references);
  std::swap(swapped.anchor_norm, swapped.reference_norm);
  const at::Tensor row = rows.contiguous(), ref_row = ref_rows.contiguous(), measured = distances.contiguous(), w = weights.contiguous();
  return {gradient_by_anchors(b.view, row, ref_row, measured, w, stream),
          gradient_by_anchors(swapped, ref_row, row, measured, w, stream)};
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, DEEPSIM_CUDA_KEY, m) {
  m.impl("pair_distances", pair_distances);
  m.impl("pair_distances_backward", pair_distances_backward);
}

}  // namespace deepsim::cuda
