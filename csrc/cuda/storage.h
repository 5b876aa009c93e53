// The dtypes that tensors come in. No torch header: it is for device code too.
#pragma once

namespace deepsim::cuda {

enum class Storage { float32, float64, bfloat16, float16 };

}  // namespace deepsim::cuda
