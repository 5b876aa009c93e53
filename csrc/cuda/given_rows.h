// Losses of given pairs and triplets on CUDA: what the torch side (given_rows_kernel.h) asks of the launches (given_rows.cu).
#pragma once

#include "../common/given_rows.h"
#include "batch_hard.h"

namespace deepsim::cuda {

// Rows of one number make up a pair or a triplet, see common/given_pairs.h.
struct GivenRows {
  Storage storage;
  Distance distance;
  Rows sets[kMostGivenSets];
  int set_count, pairs;
};

// In the type of the arithmetic.
struct GivenLosses {
  Reduction reduction;
  void* loss;                 // one number, or [rows] where nothing is reduced
  void *distances, *slopes;   // [pairs][rows]
  void* scale;                // one number: what the sum of losses was multiplied by
  LossPart* parts;            // room: [loss_parts(rows)]
  uint32_t* finished;         // 0
};

void triplet_losses(const GivenRows& rows, const GivenTriplet& formula, const GivenLosses& out, void* stream);
// y: [rows] in the type of the arithmetic.
void contrastive_losses(const GivenRows& rows, const void* y, double margin, const GivenLosses& out, void* stream);

struct GivenGradient {
  GivenRows rows;
  // In the type of the arithmetic; row t's loss weighs grad_loss[grad_loss_stride * t] * scale.
  const void *distances, *slopes, *scale, *grad_loss;
  int64_t grad_loss_stride;
  void* grads[kMostGivenSets];  // [rows][depth] in the storage dtype
};

void given_gradient(const GivenGradient& gradient, void* stream);

}  // namespace deepsim::cuda
