"""Losses of given pairs and triplets: one pass over the rows for the loss, and one for the gradient.

Such an op is <op>(*rows, *others) -> (loss, distances, slopes, scale), two or three sets of rows [T, D] and
what else it takes, the reduction last; <op>_backward(grad_loss, distances, slopes, scale, *rows, *others)
returns the gradient by each set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks
from ._autograd import differentiable


def given_rows_loss(
    op: str, sets: int, pairs: Callable[..., int], dense_loss: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Registers shapes and gradients of <op> and <op>_backward, and returns the loss as a function to call.

    sets: how many sets of rows.
    pairs: how many distances a row of them has, by the other arguments.
    dense_loss: the same loss in plain torch, of the same arguments. Its are the second derivatives, and what
        torch.func's transforms and forward mode make of the loss: being elementwise in rows, it does for them
        what it does for all.
    """

    @torch.library.register_fake(f"deepsim_ext::{op}")
    def _(*args):
        x, others = args[0], args[sets:]
        distances = x.new_empty((pairs(*others), x.shape[0]), dtype=_checks.compute_dtype(x))
        scale = distances.new_empty(())
        loss = distances.new_empty(x.shape[0] if others[-1] == "none" else ())
        return loss, distances, torch.empty_like(distances), scale

    @torch.library.register_fake(f"deepsim_ext::{op}_backward")
    def _(grad_loss, distances, slopes, scale, *args):
        return tuple(x.new_empty(x.shape) for x in args[:sets])

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *measured = output
        ctx.mark_non_differentiable(*measured)
        ctx.set_materialize_grads(False)
        _save_arguments(ctx, inputs, measured)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        measured, args = _saved_arguments(ctx, 3)
        others = (None,) * (len(args) - sets)
        if grad_loss is None:
            return (None,) * sets + others
        return *gradient(grad_loss, *measured, *args), *others

    def save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad_loss, _, _, _, *args = inputs
        _save_arguments(ctx, args, [grad_loss])

    def double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad_loss,), args = _saved_arguments(ctx, 1)
        rows, others = args[:sets], args[sets:]

        def gradient(grad_loss: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(lambda *rows: dense_loss(*rows, *others), *rows)[1](grad_loss)

        _, pull_back = torch.func.vjp(gradient, grad_loss, *rows)
        grad_grad_loss, *grad_rows = pull_back(grads)
        return grad_grad_loss, None, None, None, *grad_rows, *(None,) * len(others)

    gradient = differentiable(f"{op}_backward", double_backward, save_for_double_backward)
    forward = differentiable(op, backward, save)

    def call(*args: Any) -> Tensor:
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return dense_loss(*args)
        return forward(*args)[0]

    return call


def _save_arguments(ctx: Any, args: Any, more: list[Tensor]) -> None:
    ctx.options = [None if isinstance(a, Tensor) else a for a in args]
    ctx.save_for_backward(*more, *(a for a in args if isinstance(a, Tensor)))


def _saved_arguments(ctx: Any, more: int) -> tuple[tuple[Tensor, ...], list[Any]]:
    tensors = iter(ctx.saved_tensors)
    return tuple(next(tensors) for _ in range(more)), [next(tensors) if o is None else o for o in ctx.options]
