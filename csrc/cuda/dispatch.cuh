// Host helpers of the files that launch kernels.
#pragma once

#include "device.cuh"
#include "storage.h"

namespace deepsim::cuda {

inline int64_t blocks_for(int64_t items, int64_t per_block) { return (items + per_block - 1) / per_block; }

// Calls f with a value of the storage's element type.
template <class F>
void dispatch(Storage storage, F f) {
  switch (storage) {
    case Storage::float32: return f(float{});
    case Storage::float64: return f(double{});
    case Storage::bfloat16: return f(BFloat16{});
    case Storage::float16: return f(Half{});
  }
}

// Calls f with a value of the type of the arithmetic.
template <class F>
void dispatch_compute(Storage storage, F f) {
  storage == Storage::float64 ? f(double{}) : f(float{});
}

}  // namespace deepsim::cuda
