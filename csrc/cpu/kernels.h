// What the CPU kernels offer, compiled once for each instruction set (portable.cpp, avx2.cpp, avx512.cpp) and picked at the
// first call (capability.cpp). Pointers and plain structs only: the files behind it see no torch header.
//
// T is the type of the arithmetic: float for float32, bfloat16 and float16 storage, double for float64.
#pragma once

#include <cstdint>

#include "../common/distance.h"

namespace deepsim::cpu {

// A [count, depth] matrix in its storage dtype, rows `stride` elements apart, elements of a row adjacent.
struct Rows {
  const void* data;
  int64_t count, depth, stride;
};

// How embeddings become packed rows: row p of the packing is (x[order[p]] * row_scale - center).
template <class T>
struct Packing {
  const int32_t* order;     // [count] packed position -> row of x
  const T* center;          // [depth], subtracted to keep cancellation out of |a|^2 + |b|^2 - 2ab
  const double* row_scale;  // [count] by row of x; null means 1
};

// Rows packed for the tile product (simd/tile_product.h), filled up to whole panels with rows that never win.
template <class T>
struct PackedRows {
  T* panels;          // [panels][depth][panel_rows]
  T* half_norm;       // [panels * panel_rows], |row|^2 / 2; infinite for filling
  int32_t* original;  // [panels * panel_rows], row of x before packing; INT32_MAX for filling
  int64_t depth;
};

// The best candidates so far of a run of packed rows: value |a - b|^2 / 2 and the original index, the lowest on ties.
// INT32_MAX is the index of no candidate.
template <class T>
struct Extremes {
  T* negative;  // smallest
  T* positive;  // largest
  int32_t *negative_index, *positive_index;
};

// One rectangle of panels. Rows and columns are sorted by label, so the positives of row i are the columns positive_begin[i] up to
// positive_end[i].
template <class T>
struct TileBlock {
  PackedRows<T> rows, columns;
  const int32_t *positive_begin, *positive_end;
  int64_t row_count;                                     // rows that are not filling
  int64_t row_begin, row_end, column_begin, column_end;  // in panels
  bool symmetric;  // rows and columns are the same points: only i <= j is computed, and i is never paired with itself
};

// One rectangle to search for the hardest pairs of its rows and, where it is symmetric, of its columns.
template <class T>
struct MineBlock {
  TileBlock<T> tiles;
  Extremes<T> row_best, column_best;  // entry 0 belongs to the first row (column) of the block
};

// The gradient of sum_a coefficient[a] * (d(a, positive) - d(a, negative)).
template <class T>
struct TripletGradient {
  Rows anchors, references;               // the same matrix in the self form
  const int32_t *positives, *negatives;   // [anchors], -1 where the anchor is not valid
  const T *d_ap, *d_an, *coefficient;     // [anchors]
  const double *anchor_scale, *reference_scale;  // 1 / |row|, only for cosine
  // Anchors that chose row j: uses[use_begin[j]] up to uses[use_begin[j + 1]], ascending; 2 * anchor, + 1 as a negative.
  const int64_t* use_begin;
  const int32_t* uses;
  Distance distance;
};

// A slice of one sample's features: C channels, spatial positions [begin, end).
struct FeatureSlice {
  const void* data;
  int64_t channels, begin, end;
  int64_t channel_stride, position_stride;  // in elements; one of them is 1
};

// Where the slice's gradient goes: element (channel 0, position 0) of the sample, in the storage dtype.
struct FeatureOutput {
  void* data;
  int64_t channel_stride, position_stride;  // in elements; one of them is 1
};

// Every function takes a half-open range, so that the caller can share the work out among threads.
template <class T>
struct Kernels {
  using Compute = T;

  int64_t panel_rows;

  // sums[k] = sum over rows of x[row][k] * row_scale[row], for columns [begin, end).
  void (*column_sums)(const Rows& x, const double* row_scale, int64_t begin, int64_t end, double* sums);
  // scale[row] = 1 / |x[row]|, 0 for a zero row, NaN for a row that is not finite.
  void (*inverse_norms)(const Rows& x, int64_t begin, int64_t end, double* scale);
  void (*pack)(const Rows& x, const Packing<T>& packing, int64_t panel_begin, int64_t panel_end, const PackedRows<T>& out);
  void (*mine)(const MineBlock<T>& block);
  // d_ap, d_an of the anchors [begin, end) by direct differences; 0 where the anchor is not valid.
  void (*triplet_distances)(const Rows& anchors, const Rows& references, const int32_t* positives, const int32_t* negatives,
                            Distance distance, int64_t begin, int64_t end, T* d_ap, T* d_an);
  // Rows [begin, end) of the gradient, in the storage dtype. `row` is scratch of depth elements.
  void (*anchor_gradient)(const TripletGradient<T>& g, int64_t begin, int64_t end, T* row, void* grad);     // own triplets
  void (*reference_gradient)(const TripletGradient<T>& g, int64_t begin, int64_t end, T* row, void* grad);  // chosen by others
  void (*self_gradient)(const TripletGradient<T>& g, int64_t begin, int64_t end, T* row, void* grad);       // both
  // Upper-triangle tiles of F F^T over the slice: tiles[(I, J), I <= J][panel_rows][panel_rows]. `packed` is scratch of
  // gram_scratch(channels) elements.
  int64_t (*gram_scratch)(int64_t channels);
  void (*gram)(const FeatureSlice& slice, T* packed, T* tiles);
  // grad = M F over the slice, M a symmetric [C, C] matrix packed as [panels][C][panel_rows] (element (r, k) of a panel at
  // k * panel_rows + r, zero beyond C), in the storage dtype. `packed` is scratch for the whole slice,
  // C * panel_rows elements for every panel of positions.
  void (*gram_gradient)(const FeatureSlice& slice, const T* matrix, T* packed, const FeatureOutput& grad);
};

// By the dtype of the storage.
struct KernelTable {
  Kernels<float> float32, bfloat16, float16;
  Kernels<double> float64;
};

extern const KernelTable portable_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels;
extern const KernelTable avx512_kernels;
#endif

}  // namespace deepsim::cpu
