// What rows are moved by before products of them are formed: near the mean of all, so that |a|^2 + |b|^2 - 2ab loses few digits.
#pragma once

#include <cmath>

#include "rows.cuh"

namespace deepsim::cuda {

constexpr int kCentreColumns = 32;
constexpr int kCentreThreads = 256;

// sums[slice][k] = the sum of column k over every slices-th row, of normalised rows where there are norms.
template <class S>
__global__ void centre_sums_kernel(Rows x, const double* norms, int slices, double* sums) {
  auto& partial = shared_memory<double[kCentreThreads / kCentreColumns][kCentreColumns]>();
  const int64_t runs = (x.depth + kCentreColumns - 1) / kCentreColumns;
  const int slice = int(blockIdx.x / runs), lane = int(threadIdx.x) % kCentreColumns, group = int(threadIdx.x) / kCentreColumns;
  constexpr int kGroups = kCentreThreads / kCentreColumns;
  const int64_t k = blockIdx.x % runs * kCentreColumns + lane;
  constexpr int kAtOnce = 4;  // on their way, before the first of them is divided
  const int64_t step = int64_t(slices) * kGroups;
  double sum = 0;
  if (k < x.depth) {
    for (int64_t first = int64_t(slice) * kGroups + group; first < x.count; first += kAtOnce * step) {
      double element[kAtOnce] = {}, norm[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t row = first + i * step;
        if (row >= x.count) continue;
        element[i] = double(widen(row_of<S>(x, row)[k]));
        if (norms) norm[i] = norms[row];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (!norms) {
          sum += element[i];
        } else if (norm[i] != 0) {
          sum += element[i] / norm[i];
        }
      }
    }
  }
  partial[group][lane] = sum;
  __syncthreads();
  if (group != 0 || k >= x.depth) return;
  for (int other = 1; other < kGroups; ++other) sum += partial[other][lane];
  sums[slice * x.depth + k] = sum;
}

constexpr int kSpreadPairs = 16;  // of rows, evenly spread, by which the rows' spread is judged

// A power of two, an eighth to a quarter of the spread; 0 if there is nothing to go by. Begins and ends with a barrier.
template <class S>
__device__ __forceinline__ double centre_grid(const Rows& x, double (&square)[kSpreadPairs]) {
  const int64_t step = x.count > kSpreadPairs ? x.count / (kSpreadPairs + 1) : 1;
  const int pairs = int(x.count > kSpreadPairs ? kSpreadPairs : x.count - 1);
  __syncthreads();
  for (int i = int(threadIdx.x) / kWarp; i < pairs; i += kCentreThreads / kWarp) {
    const double s = distance_between(row_of<S>(x, i * step), row_of<S>(x, (i + 1) * step), x.depth, Distance::sqeuclidean, 1, 1);
    if (lane_index() == 0) square[i] = s;
  }
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < pairs; ++i) sum += square[i];
  const double spread = std::sqrt(sum / (2.0 * (pairs > 1 ? pairs : 1) * double(x.depth)));
  return spread > 0 && spread < infinity<double>() ? scalbn(1.0, std::ilogb(spread) - 2) : 0;
}

// The mean of the sets' means: with references both weigh the same, whatever their numbers. Any centre does as long as all rows
// are moved by the same float. Coordinates are rounded to a grid, unless rows are normalised: nearly as good, and those of rows that are
// whole numbers, or of few digits, stay so and keep their distances exact, so that equal distances are seen to be equal.
template <class S>
__global__ void __launch_bounds__(kCentreThreads) centre_kernel(Batch batch, Centre centre) {
  auto& square = shared_memory<double[kSpreadPairs]>();
  const double grid = batch.distance == Distance::cosine ? 0 : centre_grid<S>(batch.references, square);
  const int64_t k = int64_t(blockIdx.x) * kCentreThreads + threadIdx.x, depth = batch.anchors.depth;
  if (k >= depth) return;
  const auto mean = [&](int set, int64_t count) {
    double sum = 0;
    for (int s = 0; s < centre.slices; ++s) sum += centre.sums[(int64_t(set) * centre.slices + s) * depth + k];
    return sum / double(count);
  };
  double c = mean(0, batch.anchors.count);
  if (!batch.self_form) c = (c + mean(1, batch.references.count)) / 2;
  centre.at[k] = float(grid > 0 ? grid * rint(c / grid) : c);
}

}  // namespace deepsim::cuda
