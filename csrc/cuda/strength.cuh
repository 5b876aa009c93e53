// Distances as kernels over all pairs convert them, and what they pull with.
#pragma once

#include "batch_hard.h"
#include "warp.cuh"

namespace deepsim::cuda {

// From |a - b|^2 / 2 to the distance, and back. Of unit vectors it is the cosine distance.
template <class T>
__device__ __forceinline__ T distance_of_half_square(Distance distance, T half_square) {
  if (distance == Distance::euclidean) return std::sqrt(2 * half_square);
  return distance == Distance::sqeuclidean ? 2 * half_square : half_square;
}

template <class T>
__device__ __forceinline__ T half_square_of_distance(Distance distance, T d) {
  if (distance == Distance::euclidean) return d * d / 2;
  return distance == Distance::sqeuclidean ? d / 2 : d;
}

// Whether rows with these |.|^2 / 2 are so close to each other that a product would lose too much of their difference: four bits and
// more. Tensor cores cut sums off, which leaves up to 4e-7 of a product of rows that are near each other missing: 1.3e-5 of the squared
// distance of those that are not called close. Closer ones are measured, and pulled, difference by difference.
__device__ __forceinline__ bool is_close(float half_square, float half_norm, float other_half_norm) {
  return !(half_square > fmaxf(half_norm, other_half_norm) / 16);
}

// A pair of rows a, b with strength s adds s (a - b) to the gradient of a and s (b - a) to that of b; rows are unit vectors for cosine.
// Of a distance d that has weight w in the loss. d is |a - b|, |a - b|^2, or for cosine |a - b|^2 / 2; at |a - b| = 0 its slope is 0.
template <class T>
__device__ __forceinline__ T strength(Distance distance, T d, T w) {
  if (distance == Distance::euclidean) return d > 0 ? w / d : T(0);
  return distance == Distance::sqeuclidean ? 2 * w : w;
}

}  // namespace deepsim::cuda
