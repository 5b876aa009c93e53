// Semi-hard negatives of a block on the CPU: sort the given lists, search all tiles, put what was found into the order of the call.
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "../batch_hard.h"
#include "../given_lists.h"
#include "capability.h"
#include "farther_negatives.h"

namespace deepsim::cpu {
namespace {

using FartherFound = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <class T>
FartherFound search_farther(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const at::Tensor& ref,
                            const at::Tensor& ref_labels, const at::Tensor& begin, const at::Tensor& positives, const Center& about,
                            Distance distance) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  const auto nan = [&](int64_t n) { return at::full({n}, std::numeric_limits<double>::quiet_NaN(), positives.options()); };
  const auto nobody = [&](int64_t n) { return at::full({n}, -1, positives.options().dtype(at::kInt)); };
  const int64_t n = x.size(0), elements = positives.size(0);
  FartherFound found{nan(elements), nobody(elements), nan(n), nobody(n)};
  auto& [nearest, nearest_index, farthest, farthest_index] = found;

  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, OptionalTensor(ref), OptionalTensor(ref_labels), distance, about);
  if (!pairs.finite || positives.isnan().any().template item<bool>()) return found;
  // One element at least for every anchor: the search passes over panels of rows that have none.
  PositiveLists<T> lists = given_lists<T>(pairs, 1, begin, positives);
  const std::vector<int32_t> slot = sort_descending(lists);
  const FartherNegatives<T> negatives = farther_negatives(kernels, pairs, lists, distance);

  const int64_t* first = begin.const_data_ptr<int64_t>();
  const auto set = [](const at::Tensor& value, const at::Tensor& index, int64_t to, T d, int32_t row, T none) {
    value.mutable_data_ptr<T>()[to] = row == kNobody ? none : d;
    index.mutable_data_ptr<int32_t>()[to] = row == kNobody ? -1 : row;
  };
  for (int64_t p = 0; p < pairs.rows.count; ++p) {
    const int32_t anchor = pairs.rows.original[p];
    set(farthest, farthest_index, anchor, negatives.farthest[p], negatives.farthest_index[p], -infinity);
    for (int32_t s = 0; s < lists.length[p]; ++s) {
      const int64_t at = lists.at(p, s);
      set(nearest, nearest_index, first[anchor] + slot[at], negatives.nearest[at], negatives.nearest_index[at], infinity);
    }
  }
  return found;
}

FartherFound semi_hard_negatives(const at::Tensor& embeddings, const at::Tensor& labels, const at::Tensor& ref_embeddings,
                                 const at::Tensor& ref_labels, const at::Tensor& begin, const at::Tensor& positives,
                                 const OptionalTensor& center, std::string_view distance) {
  constexpr const char* function = "semi_hard_negatives";
  check_given_lists(function, embeddings, labels, ref_embeddings, ref_labels, begin, positives, center);
  const Distance d = distance_from(function, distance);
  return dispatch(embeddings.scalar_type(), [&](const auto& kernels) {
    return search_farther(kernels, with_adjacent_columns(embeddings), labels, with_adjacent_columns(ref_embeddings), ref_labels,
                          begin.contiguous(), positives.contiguous(), given_center(center), d);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("semi_hard_negatives", semi_hard_negatives); }

}  // namespace deepsim::cpu
