// Losses over all pairs of a batch, and nearest neighbours, on CUDA: what the torch side (all_pairs_kernel.h) asks of the launches.
//
// Distances are made stripe by stripe: some anchors (rows) against all references. A row kernel then sees one anchor's distances at
// once, adds to its statistics, and leaves what each distance weighs in the loss; from that the gradient is pulled together. So time
// and memory depend neither on how large classes are nor on anything that the host would have to wait for.
#pragma once

#include "../common/strategy.h"
#include "batch_hard.h"

namespace deepsim::cuda {

// Rows as tensor cores multiply them: float32, moved by the centre of all, unit vectors for cosine.
struct CentredRows {
  float* rows;       // [count][stride], zero beyond the depth
  int64_t stride;    // a multiple of 4
  float* half_norm;  // [count] |row|^2 / 2
};

// Nothing is centred where distances and gradients go by differences alone: in float64.
struct Pairs : Batch {
  CentredRows centred_anchors, centred_references;  // the same in the self form
};

// Of all rows, and flags what is not finite.
void centre_rows(const Pairs& pairs, const Centre& centre, void* stream);

constexpr int64_t kStripeColumns = 32;  // a multiple of, with what is beyond the references

struct Stripe {
  int64_t first, rows;  // anchors
  int64_t stride;       // elements from one row to the next, a multiple of kStripeColumns, at least the references
  void* distances;      // [rows][stride] in the type of the arithmetic; beyond the references undefined
  // Where it is not null, distances are only approximate, to choose neighbours by: |a - b|^2 / 2 as tensor cores have it, infinite in an
  // anchor's own column and beyond the references. [rows][stride / 32] the least of each kStripeColumns.
  float* least;
  // What distances pull with, likewise (see `strength` in strength.cuh). All are null where no gradient is wanted.
  void* strengths;         // [rows][stride] of all pairs; null also for a loss in which few pairs have any
  void* anchor_sums;       // [rows] of strengths
  void* reference_sums;    // [references]
  uint32_t* single;        // [rows][stride / 32] a bit for each pair that pulls by itself
  void* single_strengths;  // [rows][stride] of those, which count for 0 in `strengths`; may be where the distances are
};

// What an anchor adds to the statistics. For triplets, values: loss, d_ap, d_an; counts: 1 if the anchor is valid, triplets, triplets
// with a loss > 0. For pairs, values: loss of positives, of negatives, distances of positives, of negatives; counts likewise: pairs,
// and pairs with a loss > 0.
struct RowSums {
  double values[4];
  int64_t counts[4];
};

// Distances of a stripe, and none of its pairs marked as single. By tensor cores where rows are centred; otherwise flags what is not
// finite.
void stripe_distances(const Pairs& pairs, const Stripe& stripe, void* stream);

// ---- row kernels: a block for every row of the stripe ----

struct TripletWindow {
  double margin;
  bool semi_hard;  // only triplets with d_ap < d_an <= d_ap + margin
};
void batch_all_rows(const Pairs& pairs, const Stripe& stripe, const TripletWindow& window, RowSums* sums, void* stream);

struct NextFarther {
  double margin;
  bool soft;
};
void semi_hard_rows(const Pairs& pairs, const Stripe& stripe, const NextFarther& options, RowSums* sums, void* stream);

struct PairMargins {
  double positive, negative;
  bool squared;
};
// scales: device memory, what losses of positives and of negatives are multiplied by before they are added up; null: 1.
void contrastive_rows(const Pairs& pairs, const Stripe& stripe, const PairMargins& margins, const double* scales, RowSums* sums,
                      void* stream);

// Into the one split of `found`: of each anchor the positive and the negative that the strategies choose.
void mine_rows(const Pairs& pairs, const Stripe& stripe, const Strategies& strategies, const DirectFound& found, void* stream);

constexpr int64_t kMostNeighbors = 1024;
// distances [anchors][k] in the type of the arithmetic, indices [anchors][k]. Measured by differences, whatever the stripe's are.
void nearest_rows(const Pairs& pairs, const Stripe& stripe, int64_t k, void* distances, int64_t* indices, void* stream);
// After all stripes: NaN and -1 throughout where something is not finite.
void nobody_near(const Batch& batch, int64_t k, void* distances, int64_t* indices, void* stream);

// ---- gradients ----

// All add what a stripe pulls its anchors by (or, of_anchors false, the references) to a gradient [rows][depth] in the type of the
// arithmetic.

// By `strengths`. `partial` has pull_splits(...) times as many elements as the stripe's anchors (or the references) have; none for one.
int pull_splits(const Pairs& pairs, const Stripe& stripe, bool of_anchors);
void pull(const Pairs& pairs, const Stripe& stripe, bool of_anchors, int splits, void* partial, void* gradient, void* stream);
// By `single_strengths`.
void pull_singles(const Pairs& pairs, const Stripe& stripe, bool of_anchors, void* gradient, void* stream);

// Of unit vectors to of the rows, for cosine; times *scale, device memory, where it is not null; NaN where something is not finite.
void finish_gradient(const Batch& batch, bool of_anchors, const double* scale, void* gradient, void* stream);

// ---- sums ----

// What the ops return, in the type of the arithmetic.
struct LossOutputs {
  void* loss;       // one number
  int64_t* counts;  // [3] for triplets, [4] for pairs
  void* means;      // [2] distances
  double* scales;   // [2] by which the losses were multiplied: of triplets or positives, of negatives
};
void finish_triplets(const Batch& batch, const RowSums* sums, SumReduction reduction, const LossOutputs& out, void* stream);
void finish_pairs(const Batch& batch, const RowSums* sums, SumReduction reduction, const PairMargins& margins, const LossOutputs& out,
                  void* stream);

}  // namespace deepsim::cuda
