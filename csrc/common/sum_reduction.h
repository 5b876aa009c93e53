// Names of the reductions of losses over all triplets or pairs of a batch.
#pragma once

#include <c10/util/Exception.h>

#include <string_view>

#include "triplet_loss.h"

namespace deepsim {

inline SumReduction sum_reduction_from(const char* function, std::string_view name) {
  if (name == "mean") return SumReduction::mean;
  if (name == "mean_nonzero") return SumReduction::mean_nonzero;
  if (name == "sum") return SumReduction::sum;
  TORCH_CHECK_VALUE(false, function, ": reduction must be one of 'mean', 'mean_nonzero', 'sum', got '", name, "'");
}

}  // namespace deepsim
