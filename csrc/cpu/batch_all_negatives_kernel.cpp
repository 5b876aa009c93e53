// What a block of rows adds to the batch-all loss on the CPU: sort the given lists, count over all tiles, pull the rows.
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "../batch_hard.h"
#include "../given_lists.h"
#include "active_negatives.h"
#include "capability.h"

namespace deepsim::cpu {
namespace {

using Added = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
Added count(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const at::Tensor& ref,
            const at::Tensor& ref_labels, const at::Tensor& begin, const at::Tensor& positives, double margin, bool semi_hard,
            const Center& about, Distance distance, bool with_gradient) {
  const auto nan = [&](at::IntArrayRef sizes) { return at::full(sizes, std::numeric_limits<double>::quiet_NaN(), positives.options()); };
  Added added{nan({4}).to(at::kDouble), nan({positives.size(0)}), nan({with_gradient ? x.size(0) : 0, x.size(1)}),
              nan({with_gradient ? ref.size(0) : 0, x.size(1)})};
  auto& [sums, active, grad, grad_ref] = added;

  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, OptionalTensor(ref), OptionalTensor(ref_labels), distance, about);
  // With any margin a positive stays below what stands for "no pair". (False for NaN.)
  const bool comparable = positives.le(double(std::numeric_limits<T>::max() / 2)).all().template item<bool>();
  if (!pairs.finite || !comparable) return added;
  PositiveLists<T> lists = given_lists<T>(pairs, 0, begin, positives);
  const Wanted wanted{with_gradient, with_gradient};
  const GatheredGradient<T> gathered(pairs, false, wanted);
  BatchAllSums s;
  const std::vector<T> counts = active_negatives(kernels, pairs, lists, margin, semi_hard, distance, s, gathered);
  if (!std::isfinite(s.active_d_an)) return added;  // it did not fit into T

  sums = at::tensor({double(s.triplets), double(s.active), s.d_an, s.active_d_an}, sums.options());
  const int64_t* first = begin.const_data_ptr<int64_t>();
  for (int64_t p = 0; p < pairs.rows.count; ++p)
    for (int32_t t = 0; t < lists.length[p]; ++t)
      active.mutable_data_ptr<T>()[first[pairs.rows.original[p]] + t] = counts[lists.at(p, t)];
  if (!with_gradient) return added;
  PairGradients<T>(kernels, pairs, x, OptionalTensor(ref), distance, wanted).finish(T(1), gathered, T(1), grad, grad_ref);
  return added;
}

Added batch_all_negatives(const at::Tensor& embeddings, const at::Tensor& labels, const at::Tensor& ref_embeddings,
                          const at::Tensor& ref_labels, const at::Tensor& begin, const at::Tensor& positives, double margin,
                          bool semi_hard, const OptionalTensor& center, std::string_view distance, bool with_gradient) {
  constexpr const char* function = "batch_all_negatives";
  check_given_lists(function, embeddings, labels, ref_embeddings, ref_labels, begin, positives, center);
  const Distance d = distance_from(function, distance);
  return dispatch(embeddings.scalar_type(), [&](const auto& kernels) {
    return count(kernels, with_adjacent_columns(embeddings), labels, with_adjacent_columns(ref_embeddings), ref_labels, begin.contiguous(),
                 positives.contiguous(), margin, semi_hard, given_center(center), d, with_gradient);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("batch_all_negatives", batch_all_negatives); }

}  // namespace deepsim::cpu
