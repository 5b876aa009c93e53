"""A CrossBatchMemory that all ranks fill together and each has whole: its rows are the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import compute_dtype
from ..nn.embeddings import BatchContrastiveLoss, BatchLoss
from ..nn.memory import CrossBatchMemory
from ..results import ContrastiveResult, TripletLossResult
from ._batches import Batches, add_up, gather_rows
from ._result import RankResult

Result = TripletLossResult | ContrastiveResult


class Term(NamedTuple):
    """A sum of losses and what it is divided by; `sum` comes with these options in place of the loss's."""

    options: dict[str, Any]
    count: Callable[[Result], Tensor]


def add_memory_loss(
    of_batches: RankResult, memory: CrossBatchMemory, x: Tensor, labels: Tensor, batches: Batches
) -> RankResult:
    """Adds the loss of all ranks' rows against the memory; then the union of the batches goes into it."""
    result, grad = of_batches
    if memory.filled:
        ref, ref_labels = memory._rows(x.dtype)
        dtype = compute_dtype(x)
        for options, count in _terms(memory.loss, dtype):
            options = memory.loss.options | options | {"reduction": "sum", "return_stats": True}
            own = x.to(dtype, copy=True).requires_grad_(batches.with_gradient)
            with torch.set_grad_enabled(batches.with_gradient):
                found = memory.loss.function(own, labels, ref.to(dtype), ref_labels, **options)
            # Counts are exact in float64, too: one exchange for both.
            sums = torch.stack([found.loss.detach().double(), count(found).double()])
            total, divisor = add_up(sums, batches)
            divisor = divisor.clamp(min=1)
            result = result._replace(loss=result.loss + (memory.weight * total / divisor).to(dtype))
            if batches.with_gradient:
                (pull,) = torch.autograd.grad(found.loss, own)
                grad = grad + (memory.weight / divisor).to(dtype) * pull
    if memory.training:
        memory._enqueue(gather_rows(x, batches), batches.labels)
    return RankResult(result, grad)


def _terms(loss: BatchLoss, dtype: torch.dtype) -> Iterator[Term]:
    """What the loss against references adds up."""
    reduction, contrastive = loss.options["reduction"], isinstance(loss, BatchContrastiveLoss)
    if reduction == "sum":
        yield Term({}, lambda found: torch.zeros_like(found.loss))
    elif contrastive and reduction == "mean":
        yield Term({}, lambda found: found.positive_pairs + found.negative_pairs)
    elif contrastive:  # two means: each without the other's pairs, which a margin shuts out
        yield Term({"neg_margin": 0.0}, lambda found: found.active_positive_pairs)
        yield Term({"pos_margin": torch.finfo(dtype).max}, lambda found: found.active_negative_pairs)
    else:
        yield Term({}, lambda found: found.triplets if reduction == "mean" else found.active_triplets)
