"""A loss of all ranks' batches as autograd sees it on one of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..results import ContrastiveResult, TripletLossResult


class RankResult(NamedTuple):
    """What every rank has of the loss, the same bits on each, and its own share of the gradient."""

    result: TripletLossResult | ContrastiveResult
    grad: Tensor | None  # [n, D], of the loss with respect to this rank's rows; None if not wanted


class Mined(NamedTuple):
    """One positive and one negative of every row of this rank."""

    positives: Tensor  # int64 [n], global indices; -1 where the anchor lacks either
    negatives: Tensor
    finite: Tensor  # bool: no NaN or inf here, nor in what was met, nor rows too long for their squares


class WithGradient(torch.autograd.Function):
    """The loss, whose gradient is known: backward only scales it, and no rank waits for another."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.dtype = embeddings.dtype
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad_loss * grad).to(ctx.dtype), None, None
