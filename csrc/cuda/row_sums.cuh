// From the anchors' sums to a loss and its statistics.
#pragma once

#include "all_pairs.h"
#include "block.cuh"

namespace deepsim::cuda {

struct RowSumsShared {
  RowSums of_warp[kBlockWarps];
  double strength[kBlockWarps];
};

// What all threads of the block have added up, in a fixed order; the first thread gets it. Begins with a barrier.
__device__ __forceinline__ RowSums block_sums(RowSums own, RowSumsShared& shared) {
  for (int v = 0; v < 4; ++v) own.values[v] = warp_sum(own.values[v]);
  for (int v = 0; v < 4; ++v) own.counts[v] = warp_sum(own.counts[v]);
  __syncthreads();
  if (lane_index() == 0) shared.of_warp[threadIdx.x / kWarp] = own;
  __syncthreads();
  RowSums total = {};
  if (threadIdx.x != 0) return total;
  for (int w = 0; w < kBlockWarps; ++w) {
    for (int v = 0; v < 4; ++v) total.values[v] += shared.of_warp[w].values[v];
    for (int v = 0; v < 4; ++v) total.counts[v] += shared.of_warp[w].counts[v];
  }
  return total;
}

__device__ __forceinline__ double ratio(double sum, int64_t count) { return count > 0 ? sum / double(count) : 0; }

// 1 / what a sum of losses is divided by.
__device__ __forceinline__ double reduction_scale(SumReduction reduction, int64_t all, int64_t active) {
  const int64_t divisor = reduction == SumReduction::sum ? 1 : reduction == SumReduction::mean ? all : active;
  return divisor > 0 ? 1 / double(divisor) : 1;
}

struct TripletFormula {
  SumReduction reduction;

  template <class T>
  __device__ __forceinline__ void operator()(const RowSums& total, const LossOutputs& out) const {
    const double scale = reduction_scale(reduction, total.counts[1], total.counts[2]);
    *static_cast<T*>(out.loss) = T((total.values[0] < 0 ? 0 : total.values[0]) * scale);  // NaN stays NaN
    for (int i = 0; i < 3; ++i) out.counts[i] = total.counts[i];
    for (int i = 0; i < 2; ++i) static_cast<T*>(out.means)[i] = T(ratio(total.values[1 + i], total.counts[1]));
    out.scales[0] = out.scales[1] = scale;
  }
};

struct PairFormula {
  SumReduction reduction;
  bool overflows;  // a margin beyond T: a negative with a loss has an infinite one

  template <class T>
  __device__ __forceinline__ void operator()(const RowSums& total, const LossOutputs& out) const {
    const int64_t pairs = total.counts[0] + total.counts[1];
    double sum = 0;
    for (int side = 0; side < 2; ++side) {
      const int64_t active = total.counts[2 + side];
      out.scales[side] = reduction_scale(reduction, pairs, active);
      sum += (side == 1 && active > 0 && overflows ? infinity<double>() : total.values[side]) * out.scales[side];
      static_cast<T*>(out.means)[side] = T(ratio(total.values[2 + side], total.counts[side]));
    }
    *static_cast<T*>(out.loss) = T(sum);
    for (int i = 0; i < 4; ++i) out.counts[i] = total.counts[i];
  }
};

// One block.
template <class T, class Formula>
__global__ void __launch_bounds__(kBlockThreads) finish_sums_kernel(const RowSums* sums, int64_t rows, const Flags* flags, Formula formula,
                                                                    LossOutputs out) {
  auto& shared = shared_memory<RowSumsShared>();
  // Memory is read in the order in which it lies: a thread has one and the same number of every so-many-th row.
  constexpr int kNumbers = 8;
  static_assert(sizeof(RowSums) == kNumbers * sizeof(int64_t) && kBlockThreads % kNumbers == 0);
  const int number = int(threadIdx.x) % kNumbers;
  const int64_t* numbers = reinterpret_cast<const int64_t*>(sums);
  double value = 0;
  int64_t count = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < rows * kNumbers; i += kBlockThreads) {
    const int64_t n = numbers[i];
    if (number < 4) {
      value += __longlong_as_double(n);
    } else {
      count += n;
    }
  }
  RowSums total;
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    total.values[v] = number == v ? value : 0;
    total.counts[v] = number == 4 + v ? count : 0;
  }
  total = block_sums(total, shared);
  if (threadIdx.x != 0) return;
  formula.template operator()<T>(total, out);
  if (flags->not_finite == 0) return;
  *static_cast<T*>(out.loss) = not_a_number<T>();
  for (int i = 0; i < 2; ++i) static_cast<T*>(out.means)[i] = not_a_number<T>();
}

// What a row's pairs pull with, from what its threads have added up.
template <class T>
__device__ __forceinline__ void store_strength_sum(T own, const Stripe& stripe, RowSumsShared& shared) {
  if (!stripe.anchor_sums) return;
  const double sum = block_sum(double(own), shared.strength);
  if (threadIdx.x == 0) static_cast<T*>(stripe.anchor_sums)[blockIdx.x] = T(sum);
}

// A row's sums from those of its threads.
__device__ __forceinline__ void store_sums(RowSums own, RowSumsShared& shared, RowSums& out) {
  const RowSums total = block_sums(own, shared);
  if (threadIdx.x == 0) out = total;
}

}  // namespace deepsim::cuda
