// From torch's names of dtypes to the kernels'.
#pragma once

#include <ATen/core/Tensor.h>

#include "storage.h"

namespace deepsim::cuda {

inline Storage storage_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return Storage::float64;
    case at::kBFloat16: return Storage::bfloat16;
    case at::kHalf: return Storage::float16;
    default: return Storage::float32;
  }
}

}  // namespace deepsim::cuda
