// From strengths to gradients in float64, by plain arithmetic. It is the difference of rows that is multiplied: where they are close to
// each other, a product of matrices would lose it.
#pragma once

#include "all_pairs.h"
#include "block.cuh"
#include "rows.cuh"

namespace deepsim::cuda {

constexpr int kPullTile = 64;     // rows, and elements of them, of a block
constexpr int kPullOthers = 16;   // that pull at them at a time
constexpr int kPullPerThread = 4;
constexpr int kPullSide = kPullTile / kPullPerThread;
static_assert(kPullSide * kPullSide == kBlockThreads && kPullOthers * kPullTile == 4 * kBlockThreads);

struct PullShared {
  double strength[kPullOthers][kPullTile + 4];
  double other[kPullOthers][kPullTile + 4];
  int pulls[2];  // whether any of these strengths is not 0: of even and of odd steps
};

struct PullArguments {
  Rows own, others;
  const double *own_norm, *other_norm;
  int64_t first_own, own_count;      // rows whose gradient this is
  int64_t first_other, other_count;  // rows that pull
  const double* strengths;
  int64_t own_stride, other_stride;  // of strengths, from one row of either to the next
  int splits;
  const Flags* flags;
  double* out;  // [splits][own_count][depth]
  bool accumulate;
};

__global__ void __launch_bounds__(kBlockThreads) pull_kernel(PullArguments p) {
  auto& shared = shared_memory<PullShared>();
  if (p.flags->not_finite) return;  // no strengths were written
  const int64_t depth = p.own.depth;
  const int64_t row_tiles = (p.own_count + kPullTile - 1) / kPullTile, depth_tiles = (depth + kPullTile - 1) / kPullTile;
  const int64_t tile = blockIdx.x % (row_tiles * depth_tiles), split = blockIdx.x / (row_tiles * depth_tiles);
  const int64_t first_row = tile % row_tiles * kPullTile, first_element = tile / row_tiles * kPullTile;
  const int row = int(threadIdx.x) / kPullSide * kPullPerThread, element = int(threadIdx.x) % kPullSide * kPullPerThread;

  double own[kPullPerThread][kPullPerThread], sum[kPullPerThread][kPullPerThread];
  for (int i = 0; i < kPullPerThread; ++i) {
    for (int k = 0; k < kPullPerThread; ++k) {
      const int64_t r = first_row + row + i, column = first_element + element + k;
      const bool inside = r < p.own_count && column < depth;
      own[i][k] = inside ? normalised<double>(row_of<double>(p.own, p.first_own + r)[column], p.own_norm, p.first_own + r) : 0.0;
      sum[i][k] = 0;
    }
  }

  const int64_t steps = (p.other_count + kPullOthers - 1) / kPullOthers, share = (steps + p.splits - 1) / p.splits;
  const int64_t end = (split + 1) * share < steps ? (split + 1) * share : steps;
  if (threadIdx.x < 2) shared.pulls[threadIdx.x] = 0;
  for (int64_t step = split * share; step < end; ++step) {
    const int64_t first_other = step * kPullOthers;
    __syncthreads();  // everybody is through with the step before
    if (threadIdx.x == 0) shared.pulls[(step + 1) % 2] = 0;
    for (int e = 0; e < 4; ++e) {
      // Adjacent threads take adjacent strengths, whichever way they lie.
      const int at = int(threadIdx.x) + e * kBlockThreads;
      const bool along_others = p.other_stride == 1;
      const int r = along_others ? at / kPullOthers : at % kPullTile, o = along_others ? at % kPullOthers : at / kPullTile;
      const bool inside = first_row + r < p.own_count && first_other + o < p.other_count;
      const double s = inside ? p.strengths[(first_row + r) * p.own_stride + (first_other + o) * p.other_stride] : 0.0;
      shared.strength[o][r] = s;
      if (s != 0) atomicOr(&shared.pulls[step % 2], 1);
    }
    __syncthreads();
    if (shared.pulls[step % 2] == 0) continue;
    for (int e = 0; e < 4; ++e) {
      const int at = int(threadIdx.x) + e * kBlockThreads, o = at / kPullTile, k = at % kPullTile;
      const int64_t other = p.first_other + first_other + o, column = first_element + k;
      const bool inside = first_other + o < p.other_count && column < depth;
      shared.other[o][k] = inside ? normalised<double>(row_of<double>(p.others, other)[column], p.other_norm, other) : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int o = 0; o < kPullOthers; ++o) {
      double s[kPullPerThread], b[kPullPerThread];
      for (int i = 0; i < kPullPerThread; ++i) s[i] = shared.strength[o][row + i];
      for (int k = 0; k < kPullPerThread; ++k) b[k] = shared.other[o][element + k];
      for (int i = 0; i < kPullPerThread; ++i)
        for (int k = 0; k < kPullPerThread; ++k) sum[i][k] += s[i] * (own[i][k] - b[k]);
    }
  }

  double* out = p.out + split * p.own_count * depth;
  for (int i = 0; i < kPullPerThread; ++i) {
    for (int k = 0; k < kPullPerThread; ++k) {
      const int64_t r = first_row + row + i, column = first_element + element + k;
      if (r >= p.own_count || column >= depth) continue;
      double& to = out[r * depth + column];
      to = p.accumulate ? to + sum[i][k] : sum[i][k];
    }
  }
}

// gradient += the parts of all splits, in their order.
template <class T>
__global__ void add_splits_kernel(const T* partial, int splits, int64_t elements, const Flags* flags, T* gradient) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= elements || flags->not_finite) return;
  T sum = 0;
  for (int s = 0; s < splits; ++s) sum += partial[s * elements + i];
  gradient[i] += sum;
}

// One warp for a row. For cosine the gradient g by the unit vector u = x / |x| becomes (g - (g.u) u) / |x|, which is 0 for a zero row.
template <class S>
__global__ void finish_gradient_kernel(Rows x, const double* norms, const Flags* flags, const double* scale, void* gradient) {
  using T = Compute<S>;
  const int64_t i = warp_index();
  if (i >= x.count) return;
  T* g = static_cast<T*>(gradient) + i * x.depth;
  const S* row = row_of<S>(x, i);
  const bool finite = flags->not_finite == 0;
  const double norm = norms ? norms[i] : 1.0, factor = (scale ? *scale : 1.0) * (norm == 0 ? 0.0 : 1 / norm);
  double along = 0;
  if (norms && finite) {
    for (int64_t k = lane_index(); k < x.depth; k += kWarp) along += double(g[k]) * double(normalised<T>(row[k], norms, i));
    along = warp_sum(along);
  }
  for (int64_t k = lane_index(); k < x.depth; k += kWarp) {
    const double radial = norms ? along * double(normalised<T>(row[k], norms, i)) : 0.0;
    g[k] = finite ? T((double(g[k]) - radial) * factor) : not_a_number<T>();
  }
}

}  // namespace deepsim::cuda
