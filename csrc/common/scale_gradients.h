// The backward of losses whose forward op has formed their gradient already: it is only scaled. For every backend, by torch's operators.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>

#include <optional>
#include <tuple>

#include "checks.h"

namespace deepsim {

// The op `kFunction`. grad, grad_ref: the loss's gradients by embeddings and ref_embeddings as the forward op returned them; without
// with_ref_gradient, grad_ref has no rows, and neither has what comes of it. The labels and options, those of the forward op, are for the
// gradient of this gradient.
template <const char* kFunction, class... Options>
std::tuple<at::Tensor, at::Tensor> scale_gradients(const at::Tensor& grad_loss, const at::Tensor& grad, const at::Tensor& grad_ref,
                                                   const at::Tensor& embeddings, const at::Tensor&,
                                                   const std::optional<at::Tensor>& ref_embeddings, const std::optional<at::Tensor>&,
                                                   Options...) {
  const at::ScalarType type = compute_type(embeddings.scalar_type());
  const auto check_gradient = [&](const char* argument, const at::Tensor& g, const at::Tensor& x) {
    TORCH_CHECK_VALUE(g.sizes() == x.sizes(), kFunction, ": ", argument, " must be of shape ", x.sizes(),
                      ", as the forward op returns it where the gradient is wanted (with_gradient=True), got ", g.sizes());
    check_like(kFunction, argument, g, type, embeddings.device(), x.sizes());
  };
  check_like(kFunction, "grad_loss", grad_loss, type, embeddings.device(), {});
  check_gradient("grad", grad, embeddings);
  const at::Tensor none = at::empty({0, embeddings.size(1)}, grad.options());
  if (ref_embeddings) check_gradient("grad_ref", grad_ref, grad_ref.size(0) == 0 ? none : *ref_embeddings);
  const auto scaled = [&](const at::Tensor& g) { return at::mul(g, grad_loss).to(embeddings.scalar_type()); };
  return {scaled(grad), scaled(ref_embeddings ? grad_ref : none)};
}

}  // namespace deepsim
