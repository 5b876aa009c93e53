// Distances of listed pairs on CUDA: what the torch side (pair_distances_kernel.cpp) asks of the launches (pair_distances.cu).
#pragma once

#include "batch_hard.h"

namespace deepsim::cuda {

// Pair t is of row rows[t] of the anchors and row ref_rows[t] of the references. A number that is no row's makes its pair NaN.
struct ListedPairs {
  const int64_t *rows, *ref_rows;  // [count]
  int64_t count;
};

// distances: [count] in the type of the arithmetic. Of the batch neither labels, norms nor flags are read.
void measure_pairs(const Batch& batch, const ListedPairs& pairs, void* distances, void* stream);

struct PairGradient {
  Batch batch;                     // labels are not read
  const int64_t *sorted, *order;   // [count] ascending, what pairs say of an anchor; and where in their list they stand
  const int64_t* ref_rows;         // [count], in the order of the list
  const void *distances, *weights; // [count] in the type of the arithmetic, likewise
  int64_t count;
  void* grad;                      // [anchors][depth] in the type of the arithmetic
};

// The gradient by the anchors. Every row adds up its pairs in the order of the list, many of them in kRowWarps parts.
void pair_gradient(const PairGradient& gradient, void* stream);

}  // namespace deepsim::cuda
