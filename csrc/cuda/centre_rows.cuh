// Rows made ready for products of all pairs.
#pragma once

#include "all_pairs.h"
#include "rows.cuh"

namespace deepsim::cuda {

// One warp for a row.
template <class S>
__global__ void centre_rows_kernel(Rows x, const double* norms, const float* centre, Flags* flags, CentredRows out) {
  const int64_t i = warp_index();
  if (i >= x.count) return;
  // A zero row is at 1/2 + 1/2 - 0 from everyone, as long as rows are not moved.
  const bool zero_row = norms && flags->zero_row;
  const S* row = row_of<S>(x, i);
  double square = 0;
  for (int64_t k = lane_index(); k < out.stride; k += kWarp) {
    float v = 0;
    if (k < x.depth) v = normalised<float>(row[k], norms, i) - (zero_row ? 0.0f : centre[k]);
    out.rows[i * out.stride + k] = v;
    square += double(v) * double(v);
  }
  square = warp_sum(square);
  if (lane_index() != 0) return;
  // Also where a float could not hold the distance of two such rows.
  if (!(square / 2 < double(largest_float()) / 8)) atomicOr(&flags->not_finite, 1);
  out.half_norm[i] = zero_row ? 0.5f : float(square / 2);
}

}  // namespace deepsim::cuda
