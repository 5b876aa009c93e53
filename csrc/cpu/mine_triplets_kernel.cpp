// Mining by strategy on the CPU: positives from their lists; negatives over all tiles, by the search of the semi-hard loss.
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "../batch_hard.h"
#include "all_pairs.h"
#include "capability.h"
#include "choose.h"
#include "mined.h"

namespace deepsim::cpu {
namespace {

// The farthest positive, or the nearest, of those nearer than `limit`.
template <class T>
Chosen<T> choose_positives(const Kernels<T>& kernels, const PackedPairs<T>& pairs, bool nearest, const std::vector<T>& limit,
                           Distance distance) {
  Chosen<T> chosen{std::vector<T>(limit.size()), std::vector<int32_t>(limit.size(), kNobody)};
  for (const Stripe& stripe : stripes_of(pairs)) {
    const PositiveLists<T> lists = positive_lists(kernels, pairs, stripe, distance);
    const auto [first, last] = row_range(pairs, stripe);
    at::parallel_for(first, last, 64, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        // In the order of the columns, which for one label is that of the input: the first of equals has the lowest index.
        for (int64_t s = 0; s < pairs.positive_count(p); ++s) {
          const T d = lists.distance[lists.at(p, s)], best = chosen.distance[p];
          if (!(d < limit[p]) || (chosen.index[p] != kNobody && !(nearest ? d < best : d > best))) continue;
          chosen.distance[p] = d;
          chosen.index[p] = pairs.columns().original[positive_column(pairs, p, s)];
        }
      }
    });
  }
  return chosen;
}

template <class T>
Mined mine(const Kernels<T>& kernels, const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref,
           const OptionalTensor& ref_labels, Strategies strategies, Distance distance) {
  const PackedPairs<T> pairs = pack_pairs(kernels, x, labels, ref, ref_labels, distance);
  return mine_packed(pairs, [&] {
    const bool nearest = strategies.positive == Strategy::easy, farthest = strategies.negative == Strategy::easy;
    const std::vector<T> below = below_all(pairs);
    Chosen<T> positives, negatives;
    if (strategies.positive == Strategy::semihard) {
      negatives = choose_negatives(kernels, pairs, farthest, below, distance);
      positives = choose_positives(kernels, pairs, nearest, negatives.distance, distance);
    } else {
      positives = choose_positives(kernels, pairs, nearest, above_all(pairs), distance);
      const bool semi_hard = strategies.negative == Strategy::semihard;
      negatives = choose_negatives(kernels, pairs, farthest, semi_hard ? positives.distance : below, distance);
    }
    return std::pair(std::move(positives.index), std::move(negatives.index));
  });
}

std::tuple<at::Tensor, at::Tensor> mine_triplets_op(const at::Tensor& embeddings, const at::Tensor& labels,
                                                    const OptionalTensor& ref_embeddings, const OptionalTensor& ref_labels,
                                                    std::string_view positive, std::string_view negative,
                                                    std::string_view distance) {
  constexpr const char* function = "mine_triplets";
  check_batch(function, embeddings, labels, ref_embeddings, ref_labels);
  const Strategies strategies = strategies_from(function, positive, negative);
  const Distance d = distance_from(function, distance);
  const at::Tensor x = with_adjacent_columns(embeddings);
  const OptionalTensor ref = ref_embeddings ? OptionalTensor(with_adjacent_columns(*ref_embeddings)) : std::nullopt;
  Mined mined = mine_triplets(x, labels, ref, ref_labels, strategies, d);
  return {mined.positives, mined.negatives};
}

}  // namespace

Mined mine_triplets(const at::Tensor& embeddings, const at::Tensor& labels, const OptionalTensor& ref_embeddings,
                    const OptionalTensor& ref_labels, Strategies strategies, Distance distance) {
  return dispatch(embeddings.scalar_type(), [&](const auto& kernels) {
    return mine(kernels, embeddings, labels, ref_embeddings, ref_labels, strategies, distance);
  });
}

TORCH_LIBRARY_IMPL(deepsim_ext, CPU, m) { m.impl("mine_triplets", mine_triplets_op); }

}  // namespace deepsim::cpu
