// The sum of the losses of many warps, by the kernel that computes them.
#pragma once

#include "rows.cuh"

namespace deepsim::cuda {

struct LossShared {
  LossPart part[kRowThreads];
  bool last;
};

// Each block adds up what its warps' first lanes bring, and the block that is last to finish the sums of all, in an order that depends
// on their number only. True in that block's first thread: then shared.part[0] is the sum. `finished` is 0 at the start.
__device__ __forceinline__ bool sum_losses(LossPart part, LossPart* parts, uint32_t* finished, LossShared& shared) {
  if (lane_index() == 0) shared.part[threadIdx.x / kWarp] = part;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kRowWarps; ++w) {
      part.sum += shared.part[w].sum;
      part.count += shared.part[w].count;
    }
    parts[blockIdx.x] = part;
    __threadfence();  // is seen by whoever sees the ticket
    shared.last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!shared.last) return false;
  __threadfence();
  part = {0, 0};
#pragma unroll 4  // loads that wait for nothing
  for (int64_t k = threadIdx.x; k < gridDim.x; k += kRowThreads) {
    part.sum += parts[k].sum;
    part.count += parts[k].count;
  }
  shared.part[threadIdx.x] = part;
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
      shared.part[threadIdx.x].sum += shared.part[threadIdx.x + half].sum;
      shared.part[threadIdx.x].count += shared.part[threadIdx.x + half].count;
    }
  }
  return threadIdx.x == 0;
}

}  // namespace deepsim::cuda
