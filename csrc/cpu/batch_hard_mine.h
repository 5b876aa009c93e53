// Batch-hard mining on the CPU, for the mining op and for the loss.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/distance.h"

namespace deepsim::cpu {

struct Mined {
  at::Tensor positives, negatives;  // [N] int32, -1 where the anchor is not valid
  bool finite;                      // false: a NaN, inf or overflow somewhere, nothing was chosen
};

// Arguments as check_batch leaves them, elements of a row adjacent.
Mined mine_batch_hard(const at::Tensor& embeddings, const at::Tensor& labels, const std::optional<at::Tensor>& ref_embeddings,
                      const std::optional<at::Tensor>& ref_labels, Distance distance);

}  // namespace deepsim::cpu
