// Batch-hard triplet loss on CUDA: what the torch side (batch_hard_kernel.cpp) asks of the launches (batch_hard.cu).
//
// Pointers and plain structs only: no torch header reaches device code, no CUDA header the torch side. All pointers are device
// memory; nothing here waits for the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/distance.h"
#include "../common/triplet_loss.h"
#include "storage.h"

namespace deepsim::cuda {

// A [count, depth] matrix, rows `stride` elements apart, elements of a row adjacent.
struct Rows {
  const void* data;
  int64_t count, depth, stride;
};

// Words that kernels of one call leave for each other. All zero at the start.
struct Flags {
  int32_t not_finite;  // a NaN or inf in the embeddings, or rows so long that their distance overflows: nothing is chosen
  int32_t zero_row;    // cosine: some row has no direction
  uint32_t finished;   // blocks of the last kernel that are through
  uint32_t counted;    // backward: anchors that are valid, or active
};

// One call's batch. In the self form the references are the anchors.
struct Batch {
  Storage storage;
  Distance distance;
  bool self_form;
  Rows anchors, references;
  const int64_t *labels, *reference_labels;               // by row
  double *anchor_norm, *reference_norm;                    // [count], cosine only: |row|
  Flags* flags;
};

// Writes the norms and flags what is not finite. For cosine before anything else; for any distance where one of the sets
// is empty, so that mining sees no pair.
void row_norms(const Batch& batch, void* stream);

// ---- mining by direct differences: exact in every dtype, and the fastest for small batches ----

struct DirectFound {
  int splits;        // parts that the references are cut into
  void* values;      // [2][splits][anchors] in the type of the arithmetic: largest positive, smallest negative squared distance
  int32_t* indices;  // [2][splits][anchors] reference rows, kNobody where there is none
};

constexpr int32_t kNobody = 0x7fffffff;

int direct_splits(int64_t anchors, int64_t references);
void mine_direct(const Batch& batch, const DirectFound& found, void* stream);

// ---- sorting ----

// Up to so many numbers are sorted by sort_by_rank: 32,768 are to take 16 us on an H200, torch's radix sort 40.
constexpr int64_t kMostRanked = 65536;
// Room for as many numbers, and where they stood.
template <class T>
struct Runs {
  T* numbers;
  int32_t* order;
};
// Stable: sorted[k] = numbers[order[k]].
void sort_by_rank(const int64_t* numbers, int64_t count, Runs<int64_t> room, int64_t* sorted, int64_t* order, void* stream);
void sort_by_rank(const int32_t* numbers, int64_t count, Runs<int32_t> room, int32_t* sorted, int64_t* order, void* stream);

// ---- the centre that rows are moved to before products of them are formed ----

struct Centre {
  int slices;    // that rows are summed in
  double* sums;  // [2][slices][depth], in the self form [1][slices][depth]
  float* at;     // [depth]
};
int centre_slices(int64_t rows);
void find_centre(const Batch& batch, const Centre& centre, void* stream);

// ---- mining by tensor-core tiles over rows sorted by label ----

// Rows and columns of a tile; packed rows are filled up to a multiple.
constexpr int64_t kTileRows = 128;

DEEPSIM_HOST_DEVICE inline int64_t padded_rows(int64_t count) { return (count + kTileRows - 1) / kTileRows * kTileRows; }

// How many bytes a row of an operand takes. `single_pass`: float32 is rounded to 11 bits, as TF32 is, not split into two halves.
int64_t operand_row_bytes(Storage storage, int64_t depth, bool single_pass);

// One set of rows, sorted by label and made ready for the tensor cores.
struct PackedSet {
  const int64_t *order, *sorted_labels;  // [count]: packed position -> row, and its label
  unsigned char* operand;  // [tiles][row bytes / 128][kTileRows][128], see pack.cuh
  float *half_norm, *scale;              // [padded]: |row|^2 / 2, and what products of the operand are to be multiplied by
  int32_t *label_id, *original;          // [padded]: equal ids mean equal labels; row before packing
};

// The best found so far of a set's packed rows, see search_tile.cuh.
struct Keys {
  unsigned long long *positive, *negative;  // [padded rows]
};

struct TileMining {
  bool by_wgmma;  // instead of mma
  bool single_pass;
  PackedSet anchors, references;     // the same in the self form
  Centre centre;                     // nowhere for 16-bit storage: its rows stay as they are; without sums if it is given
  Keys anchor_keys, reference_keys;  // the same in the self form; none of references that look for nobody themselves
};

// Whether the current device has wgmma, and this was compiled for it.
bool can_use_wgmma();
// Leaves keys of nobody as well. After packing, neither `order` and `sorted_labels` nor the centre are needed any more.
void pack_tiles(const Batch& batch, const TileMining& mining, void* stream);
void mine_tiles(const Batch& batch, const TileMining& mining, void* stream);

// ---- from choices to losses ----

// The losses of the anchors of one block of the last kernel.
struct LossPart {
  double sum;
  int64_t count;  // of those that a mean is over
};

int64_t loss_parts(int64_t anchors);

// What the ops return. d_ap, d_an, loss in the type of the arithmetic; null where only the choice is asked for.
struct Triplets {
  int32_t *positives, *negatives;  // [anchors], -1 where the anchor is not valid
  void *d_ap, *d_an;               // [anchors], exact distances of the chosen pairs, 0 where the anchor is not valid
  void* loss;                      // one number, or [anchors] where nothing is reduced
  LossPart* parts;                 // room: [loss_parts(anchors)]; only where something is reduced
};

struct LossOptions {
  double margin;
  bool soft;
  Reduction reduction;
};

void finish_direct(const Batch& batch, const DirectFound& found, const Triplets& out, const LossOptions& options, void* stream);
void finish_tiles(const Batch& batch, const TileMining& mining, const Triplets& out, const LossOptions& options, void* stream);

// ---- choices as they were found, with what they are worth ----

// Of one set's rows, in the type of the arithmetic: the largest |a - b|^2 / 2 to a positive and the smallest to a negative, -inf and inf
// where there is none, and who that is or -1. NaN and -1 if the embeddings are not finite.
struct Extremes {
  void* half_squares;  // [2][rows]
  int32_t* indices;    // [2][rows]
  float* half_norms;   // [rows] |x|^2 / 2 of rows as they are packed; null where nobody asks
};

void extremes_of_direct(const Batch& batch, const DirectFound& found, const Extremes& out, void* stream);
void extremes_of_tiles(const Batch& batch, const TileMining& mining, bool of_references, const Extremes& out, void* stream);

// ---- backward ----

struct LossGradient {
  Batch batch;                           // labels are not read
  const int32_t *positives, *negatives;  // [anchors]
  const void *d_ap, *d_an, *grad_loss;   // in the type of the arithmetic
  int32_t* choices;  // room: [2 * anchors] positives, then negatives
  // Choices in ascending order of the chosen row: sorted_choices[u] was made by entry choice_order[u] of `choices`.
  const int32_t* sorted_choices;
  const int64_t* choice_order;
  // Room: [rows that can be chosen + 1] where in this order a row's choices begin; [anchors] in the type of the arithmetic, what the
  // gradient of d_ap is multiplied by.
  int32_t* first_choice;
  void* coefficients;
  void *grad, *grad_references;  // in the storage dtype; no grad_references in the self form, null where they are not wanted
};

// Lays the choices end to end, to be sorted; and finds out what the gradient is divided by.
void lay_choices(const LossGradient& gradient, const LossOptions& options, void* stream);
void triplet_gradient(const LossGradient& gradient, const LossOptions& options, void* stream);

}  // namespace deepsim::cuda
