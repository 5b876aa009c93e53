// Distances of all pairs of a label on the CPU: those of the tiles that pairs of a label lie in.
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "../batch_hard.h"
#include "../common/checks.h"
#include "capability.h"
#include "positive_lists.h"

namespace deepsim::cpu {
namespace {

template <class T>
at::Tensor measure(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
                   const OptionalTensor& ref_labels, const Center& about, Distance distance) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, distance, about);
  std::vector<int64_t> begin(x.size(0) + 1);
  for (int64_t p = 0; p < pairs.rows.count; ++p) begin[pairs.rows.original[p] + 1] = pairs.positive_count(p);
  for (int64_t i = 0; i < x.size(0); ++i) begin[i + 1] += begin[i];
  at::Tensor distances =
      at::full({begin.back()}, std::numeric_limits<double>::quiet_NaN(), x.options().dtype(c10::CppTypeToScalarType<T>::value));
  if (!pairs.finite) return distances;
  T* out = distances.mutable_data_ptr<T>();
  for (const Stripe& stripe : stripes_of(pairs)) {
    const PositiveLists<T> lists = positive_lists(kernels, pairs, stripe, distance);
    // In the order of the columns, which for one label is that of the input.
    const auto [first, last] = row_range(pairs, stripe);
    for (int64_t p = first; p < last; ++p)
      for (int32_t s = 0; s < lists.length[p]; ++s) out[begin[pairs.rows.original[p]] + s] = lists.distance[lists.at(p, s)];
  }
  return distances;
}

at::Tensor positive_distances(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                              const OptionalTensor& ref_labels, const OptionalTensor& center, std::string_view distance) {
  constexpr const char* function = "positive_distances";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  if (center) check_like(function, "center", *center, at::kDouble, embeddings.device(), {embeddings.size(1)});
  const Distance d = distance_from(function, distance);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  return dispatch(embeddings.scalar_type(), [&](const auto& kernels) {
    return measure(kernels, with_adjacent_columns(embeddings), labels, ref, ref_labels, given_center(center), d);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("positive_distances", positive_distances); }

}  // namespace deepsim::cpu
