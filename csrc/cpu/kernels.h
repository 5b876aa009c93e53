// What the CPU kernels offer, compiled once for each instruction set (portable.cpp, avx2.cpp, avx512.cpp) and picked at the
// first call (capability.cpp). Pointers and plain structs only: the files behind it see no torch header.
//
// T is the type of the arithmetic: float for float32, bfloat16 and float16 storage, double for float64.
#pragma once

#include <cstdint>

#include "../common/distance.h"
#include "../common/given_pairs.h"

namespace deepsim::cpu {

// A [count, depth] matrix in its storage dtype, rows `stride` elements apart, elements of a row adjacent.
struct Rows {
  const void* data;
  int64_t count, depth, stride;
};

// How embeddings become packed rows: row p of the packing is (x[order[p]] / norm - center).
template <class T>
struct Packing {
  const int32_t* order;     // [count] packed position -> row of x
  const T* center;          // [depth], subtracted to keep cancellation out of |a|^2 + |b|^2 - 2ab
  // [count] by row of x; null means 1. It is divided by, not multiplied by its inverse: so rows of one column become exactly 1 and -1.
  const double* norm;
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

// Coordinates whose products are summed one after another; then come the sums of such blocks.
inline constexpr int64_t kDepthBlock = 128;

// One rectangle of panels. Rows and columns are sorted by label, so the positives of row i are the columns positive_begin[i] up to
// positive_end[i].
template <class T>
struct TileBlock {
  PackedRows<T> rows, columns;
  const int32_t *positive_begin, *positive_end;
  int64_t row_count;                                     // rows that are not filling
  int64_t row_begin, row_end, column_begin, column_end;  // in panels
  bool symmetric;  // rows and columns are the same points: only i <= j is computed, for both, and i is never paired with itself
};

// One rectangle to search for the hardest pairs of its rows and, where it is symmetric or they are asked for, of its columns.
template <class T>
struct MineBlock {
  TileBlock<T> tiles;
  Extremes<T> row_best, column_best;  // entry 0 belongs to the first row (column) of the block
  bool of_columns;                    // in a rectangle that is not symmetric: of its columns too
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

// Lists of positives up to this length are compared one by one with every negative, longer ones searched.
inline constexpr int64_t kScannedPositives = 48;

// For every packed row its positives by distance, the farthest first. The lists of a panel's rows stand interleaved,
// [width][panel_rows], as wide as the longest of them; shorter ones are filled up with -inf.
template <class T>
struct SortedPositives {
  const int64_t* begin;  // [panels + 1], where a panel's lists begin
  const T* distance;
  // Negatives with which the positive has a loss > 0. Where the panel's lists are wider than kScannedPositives: to be added up from
  // the end of the list.
  T* active;
  const T* count;  // by packed row, positives; 0 for filling
};

// Gradients that tiles gather are packed like the rows, with one value more for each: row p's gradient is what stands there plus x_p,
// as packed, times that last value.
static constexpr int64_t gathered_depth(int64_t depth) { return depth + 1; }

// One rectangle of the batch-all triplet loss. `columns` are read in symmetric ones only. What is gathered of the gradients is
// added to, for the sum of the losses; null where none is wanted, and columns' alone where that is not.
template <class T>
struct BatchAllBlock {
  TileBlock<T> tiles;
  SortedPositives<T> rows, columns;
  T margin;
  bool semi_hard;  // only triplets with d_ap < d_an <= d_ap + margin
  Distance distance;
  T *row_gradient, *column_gradient;
};

struct BatchAllSums {
  int64_t triplets = 0, active = 0;  // looked at, and with a loss > 0
  double d_an = 0, active_d_an = 0;  // sums of d_an over these
};

// For every positive the nearest negative that is farther (the largest number of T, and INT32_MAX, where there is none), and for every
// packed row the farthest negative (-1, INT32_MAX). Where the panel's lists are wider than kScannedPositives an entry may also stand
// for all that follow it.
template <class T>
struct SemiHardLists {
  const int64_t* begin;  // [panels + 1], as in SortedPositives
  const T* positive;
  T* nearest;
  int32_t* nearest_index;
  T* farthest;
  int32_t* farthest_index;
};

// One rectangle of semi-hard mining. `columns` are used in symmetric ones only.
template <class T>
struct SemiHardBlock {
  TileBlock<T> tiles;
  SemiHardLists<T> rows, columns;
  Distance distance;
};

// Each packed row's candidates for its k nearest neighbours.
template <class T>
struct NeighborLists {
  T* value;        // [rows, filling included][capacity], |a - b|^2 / 2
  int32_t* index;  // [rows][capacity], original
  int32_t* count;  // [rows]
  T* limit;        // [rows], value of the k-th nearest known; the largest number while there are fewer
  int64_t k, capacity;
  // Keeps the k nearest of one row's candidates, the lower index on ties, and lowers its limit.
  void (*keep_nearest)(T* value, int32_t* index, int32_t* count, T* limit, int64_t k);
};

// One rectangle of the search for neighbours; who shares a label is left out. `columns` are used in the self form only.
template <class T>
struct NeighborBlock {
  TileBlock<T> tiles;
  NeighborLists<T> rows, columns;
};

// One rectangle of the contrastive loss: its negatives. Gradients as above.
template <class T>
struct ContrastiveBlock {
  TileBlock<T> tiles;
  T margin;
  bool squared;
  Distance distance;
  T *row_gradient, *column_gradient;
};

// Over ordered pairs of different labels.
struct ContrastiveSums {
  int64_t active = 0;  // with a loss > 0
  double loss = 0, distance = 0;
};

// One side of pairs, whose gradient is wanted, and the other.
struct PairSides {
  Rows rows, others;
  const double *row_scale, *other_scale;  // 1 / |row| by row, only for cosine
  Distance distance;
};

// A pair of some row whose distance has a weight in the loss.
template <class T>
struct ListedPair {
  int32_t other;  // row of the other side, as the input has it
  T distance, weight;
};

// Gradient rows: factor * what stands there + gathered_factor * what tiles gathered.
template <class T>
struct GatheredRows {
  Rows rows;
  const double* row_scale;     // as above
  const int32_t* original;     // packed position -> row
  const T *gathered, *packed;  // what tiles gathered, null for none, and the packed rows
  T factor, gathered_factor;
  Distance distance;
};

// Rows of one number make up a pair or a triplet, see common/given_pairs.h.
struct GivenRows {
  Rows sets[kMostGivenSets];
  int set_count, pairs;
  Distance distance;
};

template <class T>
struct GivenGradient {
  GivenRows rows;
  const T *distances, *slopes;  // [pairs][count]
  // Row t's loss weighs grad_loss[grad_loss_stride * t] * scale.
  const T* grad_loss;
  int64_t grad_loss_stride;
  T scale;
  void* grads[kMostGivenSets];  // [count][depth] in the storage dtype
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

  // sums[k] = sum over the rows [begin, end) of x[row][k] / norm[row], zero rows left out.
  void (*column_sums)(const Rows& x, const double* norm, int64_t begin, int64_t end, double* sums);
  // norm[row] = |x[row]|, 0 for a zero row, NaN or inf for a row that is not finite.
  void (*norms)(const Rows& x, int64_t begin, int64_t end, double* norm);
  void (*pack)(const Rows& x, const Packing<T>& packing, int64_t panel_begin, int64_t panel_end, const PackedRows<T>& out);
  void (*mine)(const MineBlock<T>& block);
  // d_ap, d_an of the anchors [begin, end) by direct differences; 0 where the anchor is not valid.
  void (*triplet_distances)(const Rows& anchors, const Rows& references, const int32_t* positives, const int32_t* negatives,
                            Distance distance, int64_t begin, int64_t end, T* d_ap, T* d_an);
  // Rows [begin, end) of the gradient, in the storage dtype. `row` is scratch of depth elements.
  void (*anchor_gradient)(const TripletGradient<T>& g, int64_t begin, int64_t end, T* row, void* grad);     // own triplets
  void (*reference_gradient)(const TripletGradient<T>& g, int64_t begin, int64_t end, T* row, void* grad);  // chosen by others
  void (*self_gradient)(const TripletGradient<T>& g, int64_t begin, int64_t end, T* row, void* grad);       // both
  // Distances of every row's positives, in the order of the columns, itself left out, for the tiles' rows: lists as SortedPositives has
  // them, unsorted and without the filling.
  void (*positive_distances)(const TileBlock<T>& tiles, Distance distance, const int64_t* list_begin, T* lists);
  void (*batch_all)(const BatchAllBlock<T>& block, BatchAllSums& sums);
  void (*semi_hard)(const SemiHardBlock<T>& block);
  void (*nearest_neighbors)(const NeighborBlock<T>& block);
  void (*contrastive_negatives)(const ContrastiveBlock<T>& block, ContrastiveSums& sums);
  // distances[k] between rows[row[k]] and others[other[k]] by direct differences, k in [begin, end).
  void (*pair_distances)(const Rows& rows, const Rows& others, const int32_t* row, const int32_t* other, Distance distance,
                         int64_t begin, int64_t end, T* distances);
  // Adds to `grad`, [depth], over pairs of `row`, weight * derivative of the distance by `row`.
  void (*pair_gradient)(const PairSides& sides, int64_t row, const ListedPair<T>* pairs, int64_t count, T* grad);
  // Rows of the packed positions [begin, end), each at its place in `grad`, [rows][depth].
  void (*finish_gradient)(const GatheredRows<T>& g, int64_t begin, int64_t end, T* grad);
  // Distances of the rows [begin, end), [end - begin][kMostGivenPairs]; not finite where a row's numbers or squares are not.
  void (*given_distances)(const GivenRows& g, int64_t begin, int64_t end, double* distances);
  void (*given_gradient)(const GivenGradient<T>& g, int64_t begin, int64_t end);
  // Upper-triangle tiles of F F^T over the slice: tiles[(I, J), I <= J][panel_rows][panel_rows], rows of panel I, columns of panel J.
  // Less work where the last panel L is short: the tiles (I, L), I < L, are transposed, and rows beyond the channels are not
  // written. Nor is what lies left of the diagonal in the tiles (I, I). `packed` is scratch of gram_scratch(channels) elements.
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
