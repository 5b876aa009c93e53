// One positive and one negative for every anchor: what mining on the CPU returns, to the mining ops and to the losses.
#pragma once

#include <ATen/ops/full.h>

#include "../common/distance.h"
#include "../mine_triplets.h"
#include "packed_pairs.h"

namespace deepsim::cpu {

struct Mined {
  at::Tensor positives, negatives;  // [N] int32, -1 where the anchor is not valid
  bool finite;                      // false: a NaN, inf or overflow somewhere, nothing was chosen
};

// Arguments as check_batch leaves them, elements of a row adjacent.
Mined mine_batch_hard(const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref, const OptionalTensor& ref_labels,
                      Distance distance);
Mined mine_triplets(const at::Tensor& x, const at::Tensor& labels, const OptionalTensor& ref, const OptionalTensor& ref_labels,
                    Strategies strategies, Distance distance);

// What search() finds, by row of the input. It returns the positives and the negatives of the packed rows, kNobody where there is none,
// and is not called where the pairs cannot be compared.
template <class T, class Search>
Mined mine_packed(const PackedPairs<T>& pairs, Search search) {
  const auto nobody = [&] { return at::full({pairs.rows.count}, -1, at::kInt); };
  Mined mined{nobody(), nobody(), pairs.finite};
  if (!pairs.finite) return mined;
  const auto [positive, negative] = search();
  int32_t* positives = mined.positives.template mutable_data_ptr<int32_t>();
  int32_t* negatives = mined.negatives.template mutable_data_ptr<int32_t>();
  for (int64_t p = 0; p < pairs.rows.count; ++p) {
    if (positive[p] == kNobody || negative[p] == kNobody) continue;
    positives[pairs.rows.original[p]] = positive[p];
    negatives[pairs.rows.original[p]] = negative[p];
  }
  return mined;
}

}  // namespace deepsim::cpu
