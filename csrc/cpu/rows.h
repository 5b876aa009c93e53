// Embedding rows between torch and the kernels.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "../common/layout.h"
#include "kernels.h"

namespace deepsim::cpu {

inline Rows rows_of(const at::Tensor& x) { return {x.const_data_ptr(), x.size(0), x.size(1), x.stride(0)}; }

// Rows of `depth` elements that are worth waking a thread for.
inline int64_t row_grain(int64_t depth) { return std::max<int64_t>(1, 32768 / depth); }

// |row|, NaN where that is not finite.
template <class T>
std::vector<double> norms(const Kernels<T>& kernels, const Rows& x) {
  std::vector<double> norm(x.count);
  at::parallel_for(0, x.count, row_grain(x.depth), [&](int64_t begin, int64_t end) { kernels.norms(x, begin, end, norm.data()); });
  return norm;
}

// 1 / |row|, 0 for a zero row.
inline std::vector<double> inverse(std::vector<double> norm) {
  for (double& n : norm) n = n == 0 ? 0 : 1 / n;
  return norm;
}

}  // namespace deepsim::cpu
