"""All ranks' rows on every rank, which computes the whole loss: least waiting, most memory and arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.embeddings import BatchLoss
from ._batches import Batches, gather_rows
from ._result import RankResult


def gathered_loss(loss: BatchLoss, x: Tensor, batches: Batches, *, with_gradient: bool) -> RankResult:
    """The same on every rank, to the bit that one process has for the union of the batches."""
    everything = gather_rows(x, batches).requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        result = loss.function(everything, batches.labels, **loss.options | {"return_stats": True})
    if not with_gradient:
        return RankResult(result, None)
    (grad,) = torch.autograd.grad(result.loss, everything)
    return RankResult(result._replace(loss=result.loss.detach()), grad[batches.rows(batches.rank)])
