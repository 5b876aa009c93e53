// Distances of given pairs of rows on the CPU, and their gradient: each row of either side gathers that of its own pairs.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "../pair_distances.h"
#include "capability.h"
#include "pair_gradient.h"

namespace deepsim::cpu {
namespace {

// As the kernels take them, all in [0, count).
std::vector<int32_t> narrowed(const char* function, const char* argument, const at::Tensor& indices, int64_t count) {
  const at::Tensor adjacent = indices.contiguous();
  const int64_t* values = adjacent.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < adjacent.size(0); ++t)
    TORCH_CHECK_INDEX(values[t] >= 0 && values[t] < count, function, ": ", argument, " must be in [0, ", count, "), got ", values[t]);
  return {values, values + adjacent.size(0)};
}

at::Tensor pair_distances(const at::Tensor& embeddings, const at::Tensor& ref_embeddings, const at::Tensor& rows,
                          const at::Tensor& ref_rows, std::string_view distance) {
  constexpr const char* function = "pair_distances";
  const Distance d = check_pairs(function, embeddings, ref_embeddings, rows, ref_rows, distance);
  const at::Tensor x = with_adjacent_columns(embeddings), ref = with_adjacent_columns(ref_embeddings);
  const auto row = narrowed(function, "rows", rows, x.size(0)), ref_row = narrowed(function, "ref_rows", ref_rows, ref.size(0));
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    at::Tensor result = at::empty({rows.size(0)}, x.options().dtype(c10::CppTypeToScalarType<T>::value));
    T* out = result.mutable_data_ptr<T>();
    at::parallel_for(0, rows.size(0), row_grain(x.size(1)), [&](int64_t begin, int64_t end) {
      kernels.pair_distances(rows_of(x), rows_of(ref), row.data(), ref_row.data(), d, begin, end, out);
    });
    return result;
  });
}

// The gradient by `rows`, of the pairs of row[t] and other[t].
template <class T>
at::Tensor gradient(const Kernels<T>& kernels, const at::Tensor& rows, const at::Tensor& others, const std::vector<int32_t>& row,
                    const std::vector<int32_t>& other, const T* distances, const T* weights, const std::vector<double>& row_scale,
                    const std::vector<double>& other_scale, Distance distance) {
  const ByRow pairs(rows.size(0), int64_t(row.size()), [&](int64_t t) { return row[t]; });
  std::vector<int32_t> in_order(rows.size(0));
  std::iota(in_order.begin(), in_order.end(), 0);
  at::Tensor grad = at::zeros({rows.size(0), rows.size(1)}, rows.options().dtype(c10::CppTypeToScalarType<T>::value));
  const auto data = [](const std::vector<double>& scale) { return scale.empty() ? nullptr : scale.data(); };
  const PairSides sides{rows_of(rows), rows_of(others), data(row_scale), data(other_scale), distance};
  const auto list = [&](int64_t i, RowPairs<T>& of_row) {
    for (int64_t e = pairs.begin[i]; e < pairs.begin[i + 1]; ++e) {
      const int64_t t = pairs.element[e];
      append(of_row, other[t], distances[t], weights[t]);
    }
  };
  add_pairs(kernels, sides, in_order.data(), 0, rows.size(0), list, grad.template mutable_data_ptr<T>());
  return grad;
}

std::tuple<at::Tensor, at::Tensor> pair_distances_backward(const at::Tensor& weights, const at::Tensor& distances,
                                                           const at::Tensor& embeddings, const at::Tensor& ref_embeddings,
                                                           const at::Tensor& rows, const at::Tensor& ref_rows,
                                                           std::string_view distance) {
  constexpr const char* function = "pair_distances_backward";
  const Distance d = check_pairs(function, embeddings, ref_embeddings, rows, ref_rows, distance);
  check_pair_weights(function, weights, distances, embeddings, rows);
  const at::Tensor x = with_adjacent_columns(embeddings), ref = with_adjacent_columns(ref_embeddings);
  const auto row = narrowed(function, "rows", rows, x.size(0)), ref_row = narrowed(function, "ref_rows", ref_rows, ref.size(0));
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    using T = typename std::decay_t<decltype(kernels)>::Compute;
    const at::Tensor w = weights.contiguous(), measured = distances.contiguous();
    const T *weight = w.const_data_ptr<T>(), *value = measured.const_data_ptr<T>();
    std::vector<double> scale, ref_scale;
    if (d == Distance::cosine) scale = inverse(norms(kernels, rows_of(x))), ref_scale = inverse(norms(kernels, rows_of(ref)));
    return std::tuple(gradient<T>(kernels, x, ref, row, ref_row, value, weight, scale, ref_scale, d),
                      gradient<T>(kernels, ref, x, ref_row, row, value, weight, ref_scale, scale, d));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) {
  m.impl("pair_distances", pair_distances);
  m.impl("pair_distances_backward", pair_distances_backward);
}

}  // namespace deepsim::cpu
