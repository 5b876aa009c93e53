// What the losses of given rows check.
#include "given_rows.h"

#include "common/checks.h"

namespace deepsim {

void check_given(const char* function, std::initializer_list<GivenSet> sets) {
  for (const auto& [name, rows] : sets) {
    const at::Tensor& first = sets.begin()->rows;
    check_rows(function, name, rows);
    check_like(function, name, rows, first.scalar_type(), first.device(), first.sizes());
  }
}

void check_given_backward(const char* function, std::initializer_list<GivenSet> sets, int pairs, const at::Tensor& grad_loss,
                          const at::Tensor& distances, const at::Tensor& slopes, const at::Tensor& scale, Reduction reduction) {
  check_given(function, sets);
  const at::Tensor& first = sets.begin()->rows;
  const at::ScalarType type = compute_type(first.scalar_type());
  const int64_t rows = first.size(0);
  check_like(function, "distances", distances, type, first.device(), {pairs, rows});
  check_like(function, "slopes", slopes, type, first.device(), {pairs, rows});
  check_like(function, "scale", scale, type, first.device(), {});
  if (reduction == Reduction::none) {
    check_like(function, "grad_loss", grad_loss, type, first.device(), {rows});
  } else {
    check_like(function, "grad_loss", grad_loss, type, first.device(), {});
  }
}

void check_contrast(const char* function, const at::Tensor& y, const at::Tensor& x1) {
  check_like(function, "y", y, compute_type(x1.scalar_type()), x1.device(), {x1.size(0)});
}

}  // namespace deepsim
