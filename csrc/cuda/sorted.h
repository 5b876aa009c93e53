// Sorting on CUDA, the torch side.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>

#include <tuple>

#include "batch_hard.h"

namespace deepsim::cuda {

// The numbers in ascending order, and where each of them stood (int64); stable.
template <class T>
std::tuple<at::Tensor, at::Tensor> sorted(const at::Tensor& numbers, void* stream) {
  const int64_t count = numbers.size(0);
  if (count == 0 || count > kMostRanked) return at::sort(numbers, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const auto i = numbers.options().dtype(at::kInt), l = numbers.options().dtype(at::kLong);
  const at::Tensor values = at::empty_like(numbers), of_runs = at::empty_like(numbers);
  const at::Tensor order = at::empty({count}, l), order_of_runs = at::empty({count}, i);
  const Runs<T> room{of_runs.mutable_data_ptr<T>(), order_of_runs.mutable_data_ptr<int32_t>()};
  sort_by_rank(numbers.const_data_ptr<T>(), count, room, values.mutable_data_ptr<T>(), order.mutable_data_ptr<int64_t>(), stream);
  return {values, order};
}

}  // namespace deepsim::cuda
