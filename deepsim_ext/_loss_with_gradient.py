"""Losses whose forward op forms their gradient as well: what is left for backward is to scale it.

Such an op is <op>(embeddings, labels, ref_embeddings, ref_labels, *options, with_gradient, with_ref_gradient)
-> (loss, counts, means, grad, grad_ref), and <op>_backward(grad_loss, grad, grad_ref, embeddings, labels,
ref_embeddings, ref_labels, *options) scales. Gradients that are not wanted have no rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._autograd import differentiable


def loss_with_gradient(op: str, counts: int, dense_loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """Registers shapes and gradients of <op> and <op>_backward, and returns <op> as a function to call.

    counts: how many counts the op returns.
    dense_loss: the same loss in plain torch, (embeddings, labels, ref_embeddings, ref_labels, *options); its
        second derivatives are those of the op.

    The function takes all arguments but the last two and returns (loss, counts, means).
    """

    @torch.library.register_fake(f"deepsim_ext::{op}")
    def _(embeddings, labels, ref_embeddings, ref_labels, *options):
        loss = embeddings.new_empty((), dtype=_checks.compute_dtype(embeddings))
        no_rows = loss.new_empty((0, embeddings.shape[1]))
        with_gradient, with_ref_gradient = options[-2:]
        return (
            loss,
            loss.new_empty(counts, dtype=torch.int64),
            loss.new_empty(2),
            loss.new_empty(embeddings.shape) if with_gradient else no_rows,
            loss.new_empty(ref_embeddings.shape)
            if with_gradient and with_ref_gradient and ref_embeddings is not None
            else torch.empty_like(no_rows),
        )

    @torch.library.register_fake(f"deepsim_ext::{op}_backward")
    def _(grad_loss, grad, grad_ref, embeddings, labels, ref_embeddings, ref_labels, *options):
        return embeddings.new_empty(embeddings.shape), embeddings.new_empty(grad_ref.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *ctx.options, _, ctx.with_ref_gradient = inputs[4:]
        _, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*others[-2:], *inputs[:4])

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_loss is None:
            return (None,) * (len(ctx.options) + 6)
        *unit, embeddings, labels, ref_embeddings, ref_labels = ctx.saved_tensors
        if ctx.needs_input_grad[2] and not ctx.with_ref_gradient:
            raise ValueError(f"{op}: the gradient by ref_embeddings needs with_ref_gradient=True in forward")
        grad, grad_ref = scale(grad_loss, *unit, embeddings, labels, ref_embeddings, ref_labels, *ctx.options)
        grad_ref = grad_ref if ref_embeddings is not None and ctx.with_ref_gradient else None
        return grad, None, grad_ref, None, *(None,) * (len(ctx.options) + 2)

    def save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_loss, _, grad_ref, *tensors = inputs[:7]
        ctx.options, ctx.with_ref_gradient = inputs[7:], grad_ref.shape[0] > 0
        ctx.save_for_backward(grad_loss, *tensors)

    def double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad_loss, embeddings, labels, ref_embeddings, ref_labels = ctx.saved_tensors
        sets = (embeddings, ref_embeddings) if ctx.with_ref_gradient else (embeddings,)

        def loss(*sets: Tensor) -> Tensor:
            x, ref = sets if len(sets) == 2 else (*sets, ref_embeddings)
            return dense_loss(x, labels, ref, ref_labels, *ctx.options)

        def gradient(grad_loss: Tensor, *sets: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(loss, *sets)[1](grad_loss)

        _, pull_back = torch.func.vjp(gradient, grad_loss, *sets)
        grad_grad_loss, grad_x, *grad_ref = pull_back(grads[: len(sets)])
        ref = grad_ref[0] if grad_ref else None
        return grad_grad_loss, None, None, grad_x, None, ref, None, *(None,) * len(ctx.options)

    scale = differentiable(f"{op}_backward", double_backward, save_for_double_backward)
    forward = differentiable(op, backward, save)

    def call(
        embeddings: Tensor, labels: Tensor, ref: Tensor | None, ref_labels: Tensor | None, *options: Any
    ):
        wanted = _gradient_is_wanted(embeddings, ref), ref is not None and _gradient_is_wanted(ref)
        return forward(embeddings, labels, ref, ref_labels, *options, *wanted)[:3]

    return call


def _gradient_is_wanted(*tensors: Tensor | None) -> bool:
    # Under torch.func's transforms the tensors that are differentiated do not say so.
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
