// k nearest neighbours on the CPU: collect candidates over all tiles, a few more than k, measure them by direct differences, sort them.
// Where a row that was left out could still be nearer, within the rounding of the tiles, the query is compared with the whole gallery by
// differences; so are few queries from the start. The result is that of differences throughout: equal distances by ascending index, at
// the last place as well.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <numeric>
#include <tuple>
#include <utility>

#include "../common/stage.h"
#include "../nearest_neighbors.h"
#include "all_pairs.h"
#include "capability.h"

namespace deepsim::cpu {
namespace {

// Queries that are compared with a gallery by differences at a time.
constexpr int64_t kFew = 16;

// Candidates beyond k that are measured: k + kSpare + k / kSpareShare in all.
constexpr int64_t kSpare = 4, kSpareShare = 16;

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
  const Blocks rows = blocks_of(pairs, 0, pairs.rows.panels), columns = blocks_of(pairs, 0, pairs.columns().panels);
  at::parallel_for(0, rows.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = 0; j < columns.count; ++j)
      for (int64_t i = begin; i < end; ++i) run(pairs.tiles(rows.begin(i), rows.begin(i + 1), columns.begin(j), columns.begin(j + 1)));
  });
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

// The k nearest rows of the gallery for each of the listed queries; without a gallery, of the other queries. Every thread keeps those of
// its part of the gallery; how it is shared out does not matter in the end. Calls visit(begin, end) for the rows that come into cache.
template <class T, class Visit>
std::vector<Nearest<T>> nearest_by_differences(const Kernels<T>& kernels, const Rows& queries, const std::vector<int32_t>& listed,
                                               const Rows* gallery, int64_t k, Distance distance, Visit visit) {
  constexpr int64_t kBlockBytes = 128 * 1024;  // of the gallery, to stay in L2 while the queries pass
  const Rows& rows = gallery ? *gallery : queries;
  const int64_t block = std::max<int64_t>(1, kBlockBytes / (rows.depth * int64_t(sizeof(T)))), blocks = (rows.count + block - 1) / block;
  std::vector<Nearest<T>> nearest(listed.size());
  std::mutex mutex;
  at::parallel_for(0, blocks, std::max<int64_t>(1, row_grain(rows.depth) / block), [&](int64_t begin, int64_t end) {
    std::vector<Nearest<T>> own(listed.size());
    std::vector<int32_t> query(block), row(block);
    std::vector<T> measured(block);
    for (int64_t first = begin * block; first < std::min(rows.count, end * block); first += block) {
      const int64_t count = std::min(block, rows.count - first);
      visit(first, first + count);
      std::iota(row.begin(), row.end(), int32_t(first));
      for (size_t i = 0; i < listed.size(); ++i) {
        std::fill(query.begin(), query.end(), listed[i]);
        kernels.pair_distances(queries, rows, query.data(), row.data(), distance, 0, count, measured.data());
        for (int64_t c = 0; c < count; ++c)
          if (gallery || row[c] != listed[i]) keep_if_near(own[i], {measured[c], row[c]}, k);
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < listed.size(); ++i)
      for (const auto& candidate : own[i]) keep_if_near(nearest[i], candidate, k);
  });
  for (Nearest<T>& found : nearest) std::sort_heap(found.begin(), found.end());
  return nearest;
}

// What |a - b|^2 / 2, for cosine distance of unit vectors, is at least by differences of the input's rows where tiles have it as t or more.
// half_norm is |a'|^2 / 2 of a packed row a' = a - center, and u the unit roundoff.
//
// Differences of packed rows are right to (D + 8) u t, by the usual bound for a sum, and products to (n + 8) u (|a'| + |b'|)^2 / 2, where n
// counts additions one after another in `tile_product`, and |b'| <= |a'| + |a' - b'|. Tiles take differences for all pairs below
// |a'|^2 / 64 and, rounding included, for none above |a'|^2 / 8. Packing moves a - b by u (|a'| + |b'|) at most and by 4 u more where unit
// vectors are rounded. Each bound grows with t where it is above 0.
template <class T>
double least_half_square(double t, double half_norm, int64_t depth, Distance distance) {
  const double u = std::numeric_limits<T>::epsilon() / 2, unit = distance == Distance::cosine ? 3 : 0;
  const double additions = double(std::min(depth, kDepthBlock) + depth / kDepthBlock);
  const auto lengths = [&](double t) { return 2 * std::sqrt(half_norm) + std::sqrt(t); };  // (|a'| + |b'|) / sqrt(2) at most
  const auto packed = [&](double t) { return t - 2 * u * std::sqrt(t) * (lengths(t) + unit); };
  const auto by_products = [&](double t) { return packed(t) - (additions + 8) * u * lengths(t) * lengths(t); };
  if (t >= half_norm / 4) return by_products(t);
  return std::min(packed(t) - (double(depth) + 8) * u * t, by_products(std::max(t, half_norm / 32)));
}

// |a - b|^2 / 2 of a measured distance, rounded up by more than measuring rounds.
template <class T>
double most_half_square(T measured, int64_t depth, Distance distance) {
  const double d = measured, half = distance == Distance::cosine ? d : distance == Distance::euclidean ? d * d / 2 : d / 2;
  return half * (1 + (double(depth) / 16 + 16) * std::numeric_limits<T>::epsilon());
}

template <class T>
std::tuple<at::Tensor, at::Tensor> search(const Kernels<T>& kernels, const at::Tensor& queries, const OptionalTensor& gallery, int64_t k,
                                          Distance distance) {
  const int64_t n = queries.size(0);
  Results<T> results(queries, k);
  // Queries have negative labels, so that they share none with the gallery.
  const Rows q = rows_of(queries), g = gallery ? rows_of(*gallery) : q;
  const SortedLabels labels = all_different(n, gallery ? -n : 0), others = gallery ? all_different(gallery->size(0), 0) : labels;
  const PackedPairs<T> pairs = pack_pairs(kernels, queries, labels, gallery, others, distance, {Center::references, {}});
  if (!pairs.finite) {
    results.set_none();
    return results.tensors();
  }

  const int64_t available = gallery ? gallery->size(0) : n - 1, kept = std::min(available, k + kSpare + k / kSpareShare);
  const int64_t rows = pairs.rows.panels * pairs.panel_rows, capacity = 2 * kept + 2 * pairs.panel_rows;
  const at::Tensor value = at::empty({rows, capacity}, c10::CppTypeToScalarType<T>::value), index = at::empty({rows, capacity}, at::kInt);
  std::vector<int32_t> count(rows);
  std::vector<T> limit(rows, std::numeric_limits<T>::max());
  const NeighborLists<T> lists{value.mutable_data_ptr<T>(), index.mutable_data_ptr<int32_t>(), count.data(), limit.data(), kept, capacity,
                               keep_nearest<T>};
  const auto collect = [&](const TileBlock<T>& tiles) { kernels.nearest_neighbors({tiles, lists, lists}); };
  if (pairs.symmetric)
    over_squares(pairs, all_panels(pairs), collect);
  else
    over_rows(pairs, collect);

  std::vector<char> unsure(n);
  {
    const Stage stage("recompute");
    at::parallel_for(0, n, std::max<int64_t>(1, row_grain(queries.size(1)) / kept), [&](int64_t begin, int64_t end) {
      std::vector<int32_t> query(kept);
      std::vector<T> exact(kept);
      Nearest<T> nearest(kept);
      for (int64_t p = begin; p < end; ++p) {
        const int32_t* candidates = lists.index + p * capacity;
        keep_nearest(lists.value + p * capacity, lists.index + p * capacity, &count[p], &limit[p], kept);
        std::fill(query.begin(), query.end(), int32_t(p));
        kernels.pair_distances(q, g, query.data(), candidates, distance, 0, kept, exact.data());
        for (int64_t i = 0; i < kept; ++i) nearest[i] = {exact[i], candidates[i]};
        std::sort(nearest.begin(), nearest.end());
        results.set(p, nearest);
        unsure[p] = kept < available && !(most_half_square(nearest[k - 1].first, q.depth, distance) <
                                          least_half_square<T>(limit[p], pairs.rows.half_norm[p], q.depth, distance));
      }
    });
  }
  const Stage stage("differences");
  std::vector<int32_t> left;
  for (int64_t p = 0; p < n; ++p)
    if (unsure[p]) left.push_back(int32_t(p));
  for (int64_t first = 0; first < int64_t(left.size()); first += kFew) {
    const std::vector<int32_t> listed(left.begin() + first, left.begin() + std::min(first + kFew, int64_t(left.size())));
    const auto nearest = nearest_by_differences(kernels, q, listed, gallery ? &g : nullptr, k, distance, [](int64_t, int64_t) {});
    for (size_t i = 0; i < listed.size(); ++i) results.set(listed[i], nearest[i]);
  }
  return results.tensors();
}

// Whether one pass over the gallery with direct differences, shared out among all threads, takes less time than packing it for tiles of
// which one thread would have most. Differences for cosine distance divide every coordinate.
bool few(const at::Tensor& queries, Distance distance) { return queries.size(0) <= (distance == Distance::cosine ? 2 : kFew); }

template <class T>
std::tuple<at::Tensor, at::Tensor> search_directly(const Kernels<T>& kernels, const at::Tensor& queries, const at::Tensor& gallery,
                                                   int64_t k, Distance distance) {
  const Stage stage("direct");
  const Rows q = rows_of(queries), g = rows_of(gallery);
  const std::vector<double> query_norm = norms(kernels, q);
  std::vector<double> norm(g.count);
  std::vector<int32_t> all(q.count);
  std::iota(all.begin(), all.end(), 0);
  const std::vector<Nearest<T>> nearest = nearest_by_differences(
      kernels, q, all, &g, k, distance, [&](int64_t begin, int64_t end) { kernels.norms(g, begin, end, norm.data()); });

  // As `can_be_compared` has it, where no length matters for cosine distance.
  const double longest =
      distance == Distance::cosine ? std::numeric_limits<double>::infinity() : std::sqrt(double(std::numeric_limits<T>::max())) / 4;
  const auto comparable = [longest](double norm) { return norm < longest; };
  const bool finite = std::all_of(query_norm.begin(), query_norm.end(), comparable) && std::all_of(norm.begin(), norm.end(), comparable);
  Results<T> results(queries, k);
  if (!finite) results.set_none();
  for (int64_t i = 0; finite && i < q.count; ++i) results.set(i, nearest[i]);
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
