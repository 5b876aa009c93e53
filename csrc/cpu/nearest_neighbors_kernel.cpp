// k nearest neighbours on the CPU: collect candidates over all tiles, measure the last k by direct differences, sort them. A few queries
// are measured by differences against the whole gallery instead.
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
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
using Nearest = std::vector<std::pair<T, int32_t>>;  // distance and row

// Distances and indices of the k nearest rows of every query.
template <class T>
class Results {
 public:
  Results(const at::Tensor& queries, int64_t k)
      : distances_(at::empty({queries.size(0), k}, queries.options().dtype(c10::CppTypeToScalarType<T>::value))),
        indices_(at::empty({queries.size(0), k}, queries.options().dtype(at::kLong))),
        k_(k) {}

  void set(int64_t query, const Nearest<T>& nearest) {
    T* distance = distances_.mutable_data_ptr<T>() + query * k_;
    int64_t* index = indices_.mutable_data_ptr<int64_t>() + query * k_;
    for (int64_t i = 0; i < k_; ++i) std::tie(distance[i], index[i]) = nearest[i];
  }

  // For inputs that cannot be compared.
  void set_none() {
    distances_.fill_(std::numeric_limits<double>::quiet_NaN());
    indices_.fill_(-1);
  }

  std::tuple<at::Tensor, at::Tensor> tensors() const { return {distances_, indices_}; }

 private:
  at::Tensor distances_, indices_;
  int64_t k_;
};

// Calls run(tiles) for every square of queries and gallery. Only the queries gather something, so each thread has some of them to
// itself, takes them all to a block of the gallery while that is in cache, and never waits for the others.
template <class T, class Run>
void over_rows(const PackedPairs<T>& pairs, Run run) {
  const Stage stage("tiles");
  const Blocks rows = blocks_of(pairs, pairs.rows.panels), columns = blocks_of(pairs, pairs.columns().panels);
  at::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = 0; j < columns.count; ++j)
      for (int64_t i = begin; i < end; ++i) run(pairs.tiles(rows.begin(i), rows.begin(i + 1), columns.begin(j), columns.begin(j + 1)));
  });
}

template <class T>
std::tuple<at::Tensor, at::Tensor> search(const Kernels<T>& kernels, const at::Tensor& queries, const OptionalTensor& gallery, int64_t k,
                                          Distance distance) {
  const int64_t n = queries.size(0);
  Results<T> results(queries, k);
  // Queries have negative labels, so that they share none with the gallery.
  const SortedLabels labels = all_different(n, gallery ? -n : 0), others = gallery ? all_different(gallery->size(0), 0) : labels;
  const PackedPairs<T> pairs = pack_pairs(kernels, queries, labels, gallery, others, distance, {Center::references, {}});
  if (!pairs.finite) {
    results.set_none();
    return results.tensors();
  }

  const int64_t rows = pairs.rows.panels * pairs.panel_rows, capacity = 2 * k + 2 * pairs.panel_rows;
  const at::Tensor value = at::empty({rows, capacity}, c10::CppTypeToScalarType<T>::value), index = at::empty({rows, capacity}, at::kInt);
  std::vector<int32_t> count(rows);
  std::vector<T> limit(rows, std::numeric_limits<T>::max());
  const NeighborLists<T> lists{value.mutable_data_ptr<T>(), index.mutable_data_ptr<int32_t>(), count.data(), limit.data(), k, capacity,
                               keep_nearest<T>};
  const auto collect = [&](const TileBlock<T>& tiles) { kernels.nearest_neighbors({tiles, lists, lists}); };
  if (pairs.symmetric)
    over_squares(pairs, collect);
  else
    over_rows(pairs, collect);

  const Stage stage("recompute");
  at::parallel_for(0, n, std::max<int64_t>(1, row_grain(queries.size(1)) / k), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> query(k);
    std::vector<T> exact(k);
    Nearest<T> nearest(k);
    for (int64_t p = begin; p < end; ++p) {
      const int32_t* candidates = lists.index + p * capacity;
      keep_nearest(lists.value + p * capacity, lists.index + p * capacity, &count[p], &limit[p], k);
      std::fill(query.begin(), query.end(), int32_t(p));
      kernels.pair_distances(rows_of(queries), rows_of(gallery ? *gallery : queries), query.data(), candidates, distance, 0, k, exact.data());
      for (int64_t i = 0; i < k; ++i) nearest[i] = {exact[i], candidates[i]};
      std::sort(nearest.begin(), nearest.end());
      results.set(p, nearest);
    }
  });
  return results.tensors();
}

// Whether one pass over the gallery with direct differences, shared out among all threads, takes less time than packing it for tiles of
// which one thread would have most. Differences for cosine distance divide every coordinate, and halves had better be converted once.
bool few(const at::Tensor& queries, Distance distance) {
  const int64_t most = distance == Distance::cosine ? 2 : 32;
  return queries.size(0) <= most && queries.element_size() >= int64_t(sizeof(float));
}

// Keeps the k smallest as a heap, the largest of them in front.
template <class T>
void keep_if_near(Nearest<T>& nearest, std::pair<T, int32_t> candidate, int64_t k) {
  if (int64_t(nearest.size()) == k) {
    if (!(candidate < nearest.front())) return;
    std::pop_heap(nearest.begin(), nearest.end());
    nearest.pop_back();
  }
  nearest.push_back(candidate);
  std::push_heap(nearest.begin(), nearest.end());
}

// Every thread keeps the nearest rows of its part of the gallery; how it is shared out does not matter in the end.
template <class T>
std::tuple<at::Tensor, at::Tensor> search_directly(const Kernels<T>& kernels, const at::Tensor& queries, const at::Tensor& gallery,
                                                   int64_t k, Distance distance) {
  const Stage stage("direct");
  constexpr int64_t kBlockBytes = 128 * 1024;  // of the gallery, to stay in L2 while the queries pass
  const Rows q = rows_of(queries), g = rows_of(gallery);
  const int64_t block = std::max<int64_t>(1, kBlockBytes / (g.depth * gallery.element_size())), blocks = (g.count + block - 1) / block;
  const std::vector<double> query_norm = norms(kernels, q);
  std::vector<double> norm(g.count);
  std::vector<Nearest<T>> nearest(q.count);
  std::mutex mutex;
  at::parallel_for(0, blocks, std::max<int64_t>(1, row_grain(g.depth) / block), [&](int64_t begin, int64_t end) {
    std::vector<Nearest<T>> own(q.count);
    std::vector<int32_t> query(block), row(block);
    std::vector<T> measured(block);
    for (int64_t first = begin * block; first < std::min(g.count, end * block); first += block) {
      const int64_t count = std::min(block, g.count - first);
      kernels.norms(g, first, first + count, norm.data());
      std::iota(row.begin(), row.end(), int32_t(first));
      for (int64_t i = 0; i < q.count; ++i) {
        std::fill(query.begin(), query.end(), int32_t(i));
        kernels.pair_distances(q, g, query.data(), row.data(), distance, 0, count, measured.data());
        for (int64_t c = 0; c < count; ++c) keep_if_near(own[i], {measured[c], row[c]}, k);
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < q.count; ++i)
      for (const auto& candidate : own[i]) keep_if_near(nearest[i], candidate, k);
  });

  // As `can_be_compared` has it, where no length matters for cosine distance.
  const double longest =
      distance == Distance::cosine ? std::numeric_limits<double>::infinity() : std::sqrt(double(std::numeric_limits<T>::max())) / 4;
  const auto comparable = [longest](double norm) { return norm < longest; };
  const bool finite = std::all_of(query_norm.begin(), query_norm.end(), comparable) && std::all_of(norm.begin(), norm.end(), comparable);
  Results<T> results(queries, k);
  if (!finite) results.set_none();
  for (int64_t i = 0; finite && i < q.count; ++i) {
    std::sort_heap(nearest[i].begin(), nearest[i].end());
    results.set(i, nearest[i]);
  }
  return results.tensors();
}

std::tuple<at::Tensor, at::Tensor> nearest_neighbors(const at::Tensor& queries, const OptionalTensor& gallery, int64_t k,
                                                     std::string_view distance) {
  const Distance d = check_nearest_neighbors(queries, gallery, k, distance);
  const at::Tensor x = with_adjacent_columns(queries);
  const OptionalTensor others = gallery ? OptionalTensor(with_adjacent_columns(*gallery)) : std::nullopt;
  return dispatch(x.scalar_type(), [&](const auto& kernels) {
    return others && few(x, d) ? search_directly(kernels, x, *others, k, d) : search(kernels, x, others, k, d);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("nearest_neighbors", nearest_neighbors); }

}  // namespace deepsim::cpu
