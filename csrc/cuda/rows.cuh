// Embedding rows in device code: access, exact distances, norms.
#pragma once

#include "batch_hard.h"
#include "warp.cuh"

namespace deepsim::cuda {

// Of kernels with a warp for a row.
constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;

// The number of this warp in the grid.
__device__ __forceinline__ int64_t warp_index() { return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; }

template <class S>
__device__ __forceinline__ const S* row_of(const Rows& x, int64_t i) {
  return static_cast<const S*>(x.data) + i * x.stride;
}

// |row|, the same in all lanes.
template <class S>
__device__ __forceinline__ double norm_of(const S* row, int64_t depth) {
  double square = 0;
#pragma unroll 4
  for (int64_t k = lane_index(); k < depth; k += kWarp) square += double(widen(row[k])) * double(widen(row[k]));
  return std::sqrt(warp_sum(square));
}

// An element as distances see it: for cosine (where there are norms) that of the unit vector, or of zero. Divided, not multiplied by
// the inverse: so rows of one column become exactly 1 and -1.
template <class T, class S>
__device__ __forceinline__ T normalised(S v, const double* norms, int64_t row) {
  if (!norms) return T(widen(v));
  return norms[row] == 0 ? T(0) : T(double(widen(v)) / norms[row]);
}

// The distances of row a and some others by direct differences in double, by one warp, which waits for all of them at once. Norms are read
// for cosine only.
template <int kOthers, class S>
__device__ __forceinline__ void distances_between(const S* a, const S* const (&others)[kOthers], int64_t depth, Distance distance,
                                                  double norm, const double (&other_norms)[kOthers], double (&distances)[kOthers]) {
  const bool cosine = distance == Distance::cosine;
  double squares[kOthers] = {};
  const auto add = [&](int64_t k, auto element) {
    const double own = element(a[k], norm);
    for (int o = 0; o < kOthers; ++o) {
      const double difference = own - element(others[o][k], other_norms[o]);
      squares[o] += difference * difference;
    }
  };
  if (cosine) {
    // Divided, not multiplied by the inverse: so rows of one column become exactly 1 and -1.
#pragma unroll 1
    for (int64_t k = lane_index(); k < depth; k += kWarp) add(k, [](S v, double norm) { return double(widen(v)) / norm; });
  } else {
#pragma unroll 4
    for (int64_t k = lane_index(); k < depth; k += kWarp) add(k, [](S v, double) { return double(widen(v)); });
  }
  for (int o = 0; o < kOthers; ++o) {
    const double square = warp_sum(squares[o]);
    // |a/|a| - b/|b||^2 / 2 = 1 - cos, without its cancellation for nearly parallel rows.
    distances[o] = distance == Distance::euclidean ? std::sqrt(square) : cosine ? square / 2 : square;
    if (cosine && (norm == 0 || other_norms[o] == 0)) distances[o] = 1;
  }
}

template <class S>
__device__ __forceinline__ double distance_between(const S* a, const S* b, int64_t depth, Distance distance, double norm_a,
                                                   double norm_b) {
  double result[1];
  distances_between<1, S>(a, {b}, depth, distance, norm_a, {norm_b}, result);
  return result[0];
}

// What u - other is multiplied by in coefficient * (derivative of d(u, other) by u): (u - other) / d if d is Euclidean, taken as 0 at 0.
// NaN where either is.
template <class T>
__device__ __forceinline__ T euclidean_factor(Distance distance, T d, T coefficient) {
  if (distance == Distance::sqeuclidean) return 2 * coefficient;
  if (d > 0) return coefficient / d;
  return d == 0 && coefficient == coefficient ? T(0) : d + coefficient;
}

// The first position whose value is not less, by one warp: 32 probes at a time.
template <class T>
__device__ __forceinline__ int64_t lower_bound(const T* sorted, int64_t count, T value) {
  int64_t low = 0, high = count;  // everything before low is less, everything from high on is not
  while (low < high) {
    const int64_t step = (high - low + kWarp - 1) / kWarp, probe = low + lane_index() * step;
    const int less = __popc(__ballot_sync(kAllLanes, probe < high && sorted[probe] < value));
    if (less == 0) return low;
    const int64_t last_less = low + (less - 1) * step;
    if (last_less + step < high) high = last_less + step;
    low = last_less + 1;
  }
  return low;
}

template <class S>
__global__ void norms_kernel(Rows x, double* norm, Flags* flags) {
  const int64_t i = warp_index();
  if (i >= x.count) return;
  const S* row = row_of<S>(x, i);
  double square = 0;
  for (int64_t k = lane_index(); k < x.depth; k += kWarp) square += double(widen(row[k])) * double(widen(row[k]));
  square = warp_sum(square);
  if (lane_index() != 0) return;
  const bool finite = square < infinity<double>();
  if (!finite) atomicOr(&flags->not_finite, 1);
  if (square == 0) atomicOr(&flags->zero_row, 1);
  if (norm) norm[i] = finite ? std::sqrt(square) : not_a_number<double>();
}

}  // namespace deepsim::cuda
