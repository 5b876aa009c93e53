// What mining found, row by row, with its half squared distances: for the op batch_hard_extremes.
#pragma once

#include "triplets.cuh"

namespace deepsim::cuda {

// A thread for each row, in the order of the choices.
template <class T, class Choices>
__global__ void extremes_kernel(int64_t rows, Choices choices, const float* half_norms, const Flags* flags, Extremes out) {
  const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p >= rows) return;
  const int64_t row = choices.anchor(p);
  const bool finite = flags->not_finite == 0;
  const auto write = [&](int64_t at, const auto& best) {
    static_cast<T*>(out.half_squares)[at] = finite ? best.value : not_a_number<T>();
    out.indices[at] = finite && best.index != kNobody ? best.index : -1;
  };
  write(row, choices.farthest(p));
  write(rows + row, choices.nearest(p));
  if (out.half_norms) out.half_norms[row] = half_norms[p];
}

}  // namespace deepsim::cuda
