// Losses of given pairs and triplets of rows: what every backend checks and agrees on.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>

#include "batch_hard.h"
#include "common/given_rows.h"

namespace deepsim {

// One of the sets of rows [T, D] of a loss, and what errors call it.
struct GivenSet {
  const char* name;
  const at::Tensor& rows;
};

// Throws unless the sets fit together.
void check_given(const char* function, std::initializer_list<GivenSet> sets);

// The same for the arguments of a backward op: distances and slopes [pairs, T], scale [].
void check_given_backward(const char* function, std::initializer_list<GivenSet> sets, int pairs, const at::Tensor& grad_loss,
                          const at::Tensor& distances, const at::Tensor& slopes, const at::Tensor& scale, Reduction reduction);

// Throws unless y [T] is in the type of the arithmetic on x1 [T, D].
void check_contrast(const char* function, const at::Tensor& y, const at::Tensor& x1);

}  // namespace deepsim
