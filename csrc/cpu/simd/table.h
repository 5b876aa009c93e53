// The kernels of one instruction set, gathered in the table that capability.cpp picks from.
#pragma once

#include "batch_all.h"
#include "batch_contrastive.h"
#include "given_rows.h"
#include "gram.h"
#include "mine.h"
#include "nearest_neighbors.h"
#include "pair_gradient.h"
#include "semi_hard.h"
#include "triplets.h"

namespace deepsim::cpu::DEEPSIM_CAPABILITY {

template <class S>
constexpr Kernels<typename ComputeOf<S>::type> kernels_for() {
  using T = typename ComputeOf<S>::type;
  return {kPanelRows<T>,
          column_sums<S>,
          norms<S>,
          pack<S>,
          mine<T>,
          triplet_distances<S>,
          triplet_gradient<S, true, false>,
          triplet_gradient<S, false, true>,
          triplet_gradient<S, true, true>,
          positive_distances<T>,
          batch_all<T>,
          semi_hard<T>,
          nearest_neighbors<T>,
          contrastive_negatives<T>,
          pair_distances<S>,
          pair_gradient<S>,
          finish_gradient<S>,
          given_distances<S>,
          given_gradient<S>,
          gram_scratch<T>,
          gram<S>,
          gram_gradient<S>};
}

constexpr KernelTable table() { return {kernels_for<float>(), kernels_for<BFloat16>(), kernels_for<Float16>(), kernels_for<double>()}; }

}  // namespace deepsim::cpu::DEEPSIM_CAPABILITY
