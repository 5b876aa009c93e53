// k nearest neighbours on the CPU: collect candidates over all tiles, measure the last k by direct differences, sort them.
#include <torch/library.h>

#include <numeric>
#include <tuple>

#include "../nearest_neighbors.h"
#include "all_pairs.h"
#include "capability.h"

namespace deepsim::cpu {
namespace {

template <class T>
void keep_nearest(T* value, int32_t* index, int32_t* count, T* limit, int64_t k) {
  thread_local std::vector<std::pair<T, int32_t>> candidates;
  candidates.clear();
  for (int32_t i = 0; i < *count; ++i) candidates.emplace_back(value[i], index[i]);
  if (*count > k) {
    std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end());
    candidates.resize(k);
    *limit = candidates.back().first;
  }
  *count = int32_t(candidates.size());
  for (int32_t i = 0; i < *count; ++i) std::tie(value[i], index[i]) = candidates[i];
}

// Labels that nobody shares but a row with itself, so that it is left out.
SortedLabels all_different(int64_t n, int64_t first) {
  SortedLabels labels{std::vector<int32_t>(n), std::vector<int64_t>(n)};
  std::iota(labels.order.begin(), labels.order.end(), 0);
  std::iota(labels.labels.begin(), labels.labels.end(), first);
  return labels;
}

template <class T>
std::tuple<at::Tensor, at::Tensor> search(const Kernels<T>& kernels, const at::Tensor& queries, const OptionalTensor& gallery, int64_t k,
                                          Distance distance) {
  const int64_t n = queries.size(0);
  const auto options = queries.options();
  at::Tensor distances = at::empty({n, k}, options.dtype(c10::CppTypeToScalarType<T>::value));
  at::Tensor indices = at::empty({n, k}, options.dtype(at::kLong));
  // Queries have negative labels, so that they share none with the gallery.
  const PackedPairs<T> pairs = gallery
                                   ? pack_pairs(kernels, queries, all_different(n, -n), gallery, all_different(gallery->size(0), 0), distance)
                                   : pack_pairs(kernels, queries, all_different(n, 0), gallery, all_different(n, 0), distance);
  if (!pairs.finite) {
    distances.fill_(std::numeric_limits<double>::quiet_NaN());
    indices.fill_(-1);
    return {distances, indices};
  }

  const int64_t rows = pairs.rows.panels * pairs.panel_rows, capacity = 2 * k + 2 * pairs.panel_rows;
  const at::Tensor value = at::empty({rows, capacity}, distances.options()), index = at::empty({rows, capacity}, options.dtype(at::kInt));
  std::vector<int32_t> count(rows);
  std::vector<T> limit(rows, std::numeric_limits<T>::max());
  const NeighborLists<T> lists{value.mutable_data_ptr<T>(), index.mutable_data_ptr<int32_t>(), count.data(), limit.data(), k, capacity,
                               keep_nearest<T>};
  over_squares(pairs, [&](const TileBlock<T>& tiles) { kernels.nearest_neighbors({tiles, lists, lists}); });

  const Stage stage("recompute");
  T* out = distances.mutable_data_ptr<T>();
  int64_t* out_index = indices.mutable_data_ptr<int64_t>();
  at::parallel_for(0, n, std::max<int64_t>(1, row_grain(queries.size(1)) / k), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> query(k);
    std::vector<T> exact(k);
    std::vector<std::pair<T, int32_t>> nearest(k);
    for (int64_t p = begin; p < end; ++p) {
      const int32_t* candidates = lists.index + p * capacity;
      keep_nearest(lists.value + p * capacity, lists.index + p * capacity, &count[p], &limit[p], k);
      std::fill(query.begin(), query.end(), int32_t(p));
      kernels.pair_distances(rows_of(queries), rows_of(gallery ? *gallery : queries), query.data(), candidates, distance, 0, k, exact.data());
      for (int64_t i = 0; i < k; ++i) nearest[i] = {exact[i], candidates[i]};
      std::sort(nearest.begin(), nearest.end());
      for (int64_t i = 0; i < k; ++i) {
        out[p * k + i] = nearest[i].first;
        out_index[p * k + i] = nearest[i].second;
      }
    }
  });
  return {distances, indices};
}

std::tuple<at::Tensor, at::Tensor> nearest_neighbors(const at::Tensor& queries, const OptionalTensor& gallery, int64_t k,
                                                     std::string_view distance) {
  const Distance d = check_nearest_neighbors(queries, gallery, k, distance);
  const at::Tensor x = with_adjacent_columns(queries);
  const OptionalTensor others = gallery ? OptionalTensor(with_adjacent_columns(*gallery)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) { return search(kernels, x, others, k, d); });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("nearest_neighbors", nearest_neighbors); }

}  // namespace deepsim::cpu
