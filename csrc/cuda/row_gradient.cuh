// The gradient of a row by which some distances pull: gathered by a warp, where they are many by a block.
#pragma once

#include "rows.cuh"

namespace deepsim::cuda {

// Elements of a row that a lane has.
constexpr int kGradientRun = 4;
constexpr int kGradientColumns = kWarp * kGradientRun;

// Rows of more pairs are added up by the whole block.
constexpr uint32_t kManyPairs = 64;

// Blocks on a multiprocessor at least: warps wait for rows, and only others hide that.
template <class S>
constexpr int kGradientBlocks = sizeof(Compute<S>) == 4 ? 3 : 2;

// A pair of a row: who it is with, or -1 where that is no row, and what the derivative of its distance d is multiplied by.
template <class T>
struct PullingPair {
  int32_t other;
  T d, coefficient;
};

template <class S>
struct RowGradient {
  using T = Compute<S>;

  const Batch& batch;
  int64_t column;  // this lane's first; the others follow at a distance of kWarp
  T row[kGradientRun] = {};
  double norm = 0;  // of the row; for cosine only
  T sum[kGradientRun] = {};

  __device__ __forceinline__ RowGradient(const Batch& of, int64_t first_column) : batch(of), column(first_column + lane_index()) {}

  __device__ __forceinline__ T element(const S* x, int e) const {
    const int64_t k = column + e * kWarp;
    return k < batch.anchors.depth ? T(widen(x[k])) : T(0);
  }

  __device__ __forceinline__ void take(const Rows& rows, const double* norms, int64_t i) {
    for (int e = 0; e < kGradientRun; ++e) row[e] = element(row_of<S>(rows, i), e);
    norm = norms ? norms[i] : 0;
  }

  // This lane's elements of another row. Rows that are wanted one after the other are best read together: a warp waits for what it reads.
  struct Other {
    double norm;
    T element[kGradientRun];
  };
  __device__ __forceinline__ Other read(const Rows& rows, const double* norms, int64_t i) const {
    Other other{norms ? norms[i] : 0, {}};
    for (int e = 0; e < kGradientRun; ++e) other.element[e] = element(row_of<S>(rows, i), e);
    return other;
  }

  // sum += coefficient * (derivative of d(row, other) by row).
  __device__ __forceinline__ void add(const Other& other, T d, T coefficient) {
    if (batch.distance == Distance::cosine) {
      // (cos * u/|u| - other/|other|) / |u|, 0 for a zero row; cos = 1 - d.
      if (norm == 0) return;
      const double on_row = double(coefficient) * (1 - double(d)) / norm / norm;
      const double on_other = other.norm == 0 ? 0 : double(coefficient) / norm / other.norm;
      for (int e = 0; e < kGradientRun; ++e) sum[e] += T(on_row * double(row[e]) - on_other * double(other.element[e]));
      return;
    }
    const T factor = euclidean_factor(batch.distance, d, coefficient);
    if (factor == 0) return;
    for (int e = 0; e < kGradientRun; ++e) sum[e] += factor * (row[e] - other.element[e]);
  }

  // Adds the pairs begin, begin + step, ... before end with some of `others`. Lanes look one up each, so that rows are all that is waited
  // for one after another, and two of them at once.
  template <class Look>
  __device__ __forceinline__ void add_pairs(uint32_t begin, uint32_t end, uint32_t step, const Rows& others, const double* other_norms,
                                            Look look) {
    for (uint32_t first = begin; first < end; first += kWarp * step) {
      const uint32_t own = first + uint32_t(lane_index()) * step, left = (end - first + step - 1) / step;
      PullingPair<T> pair = {0, 0, 0};
      if (own < end) pair = look(own);
      for (uint32_t l = 0; l < kWarp && l < left; l += 2) {
        Other rows[2] = {};
        T c[2];
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const int32_t other = __shfl_sync(kAllLanes, pair.other, l + o);
          c[o] = __shfl_sync(kAllLanes, pair.coefficient, l + o);
          if (c[o] != 0 && other >= 0) rows[o] = read(others, other_norms, other);
        }
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const T d = __shfl_sync(kAllLanes, pair.d, l + o);
          if (c[o] != 0) add(rows[o], d, c[o]);
        }
      }
    }
  }

  // store(column, what was added up) of this lane's columns.
  template <class Store>
  __device__ __forceinline__ void store(Store store) const {
    for (int e = 0; e < kGradientRun; ++e) {
      const int64_t k = column + e * kWarp;
      if (k < batch.anchors.depth) store(k, sum[e]);
    }
  }
};

// What a block of warps with a row each does of a gradient of `rows` rows.
struct GradientPart {
  int64_t first_row, first_column;

  __device__ __forceinline__ explicit GradientPart(int64_t rows) {
    const int64_t row_blocks = (rows + kRowWarps - 1) / kRowWarps;
    first_row = blockIdx.x % row_blocks * kRowWarps;
    first_column = blockIdx.x / row_blocks * kGradientColumns;
  }

  // That of this warp, which may be beyond the last.
  __device__ __forceinline__ int64_t row() const { return first_row + int64_t(threadIdx.x) / kWarp; }
};

struct GradientShared {
  uint32_t begin[kRowWarps], end[kRowWarps];
  double partial[kRowWarps][kGradientColumns];
};

// Adds to each warp's own row, one of `rows`, its pairs [begin, end) with some of `others`. All of the block is to call it.
template <class S, class Look>
__device__ __forceinline__ void add_pairs_of_block(GradientShared& shared, RowGradient<S>& own, const GradientPart& part, const Rows& rows,
                                                   const double* norms, uint32_t begin, uint32_t end, const Rows& others,
                                                   const double* other_norms, Look look) {
  using T = Compute<S>;
  const int warp = int(threadIdx.x) / kWarp;
  if (end - begin <= kManyPairs) own.add_pairs(begin, end, 1, others, other_norms, look);
  if (lane_index() == 0) {
    shared.begin[warp] = begin;
    shared.end[warp] = end;
  }
  __syncthreads();
  for (int w = 0; w < kRowWarps; ++w) {
    if (shared.end[w] - shared.begin[w] <= kManyPairs) continue;  // the same for the whole block
    RowGradient<S> of_warp(own.batch, part.first_column);
    of_warp.take(rows, norms, part.first_row + w);
    of_warp.add_pairs(shared.begin[w] + warp, shared.end[w], kRowWarps, others, other_norms, look);
    for (int e = 0; e < kGradientRun; ++e) shared.partial[warp][e * kWarp + lane_index()] = double(of_warp.sum[e]);
    __syncthreads();
    if (warp == w) {
      for (int e = 0; e < kGradientRun; ++e) {
        double sum = 0;
        for (int from = 0; from < kRowWarps; ++from) sum += shared.partial[from][e * kWarp + lane_index()];
        own.sum[e] += T(sum);
      }
    }
    __syncthreads();
  }
}

}  // namespace deepsim::cuda
