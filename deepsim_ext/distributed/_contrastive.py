"""Contrastive loss over all ranks: negatives by blocks, each two of which meet once; positives by a list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import compute_dtype
from ..results import ContrastiveResult
from ._batches import Batches, add_up
from ._pairs import Pairs
from ._positives import positive_pairs
from ._result import RankResult
from ._ring import Meeting, go_round


def ring_loss(
    x: Tensor,
    labels: Tensor,
    batches: Batches,
    *,
    pos_margin: float,
    neg_margin: float,
    squared: bool,
    distance: str,
    reduction: str,
    with_gradient: bool,
) -> RankResult:
    dtype = compute_dtype(x)
    no_positives = torch.finfo(dtype).max  # a margin that no pair is beyond

    def negatives(
        x: Tensor, labels: Tensor, ref: Tensor | None, ref_labels: Tensor | None
    ) -> Sequence[Tensor]:
        options = no_positives, neg_margin, squared, distance, "sum", with_gradient, with_gradient
        return torch.ops.deepsim_ext.batch_contrastive_loss(x, labels, ref, ref_labels, *options)

    loss, counts, means, grad, _ = negatives(x, labels, None, None)
    # Over ordered pairs of negatives: loss, pairs, pairs with a loss, distance.
    sums = _negative_sums(loss, counts, means)

    def visit(meeting: Meeting, theirs: Tensor) -> Sequence[Tensor]:
        nonlocal sums
        their_labels = batches.labels[batches.rows(meeting.other)][meeting.theirs]
        found = negatives(x[meeting.mine], labels[meeting.mine], theirs, their_labels)
        sums += 2 * _negative_sums(*found[:3])  # each pair in either order
        if not with_gradient:
            return ()
        grad[meeting.mine] += 2 * found[3]
        return (2 * found[4],)

    def expect(count: int) -> Sequence[Tensor]:
        return (grad.new_empty(count, x.shape[1]),) if with_gradient else ()

    def collect(_: int, mine: slice, found: Sequence[Tensor]) -> None:
        if found:
            grad[mine] += found[0]

    go_round(x, batches, visit, expect, collect, once=True)

    pairs = Pairs(x, *positive_pairs(batches), batches)
    d = pairs.distances(distance)
    beyond = (d - pos_margin).relu()
    positive_sums = [(beyond.square() if squared else beyond).sum(dtype=torch.float64), (beyond > 0).sum()]
    positive_sums += [torch.tensor(len(d), device=d.device), d.sum(dtype=torch.float64)]
    sums = torch.cat([torch.stack([s.double() for s in positive_sums]), sums])
    positive_loss, active_positives, positives, d_positive, *negative = add_up(sums, batches)
    negative_loss, negatives_, active_negatives, d_negative = negative

    everything, one = positives + negatives_, torch.ones_like(positives)
    positive_divisor, negative_divisor = {
        "sum": (one, one),
        "mean": (everything, everything),
        "mean_nonzero": (active_positives, active_negatives),
    }[reduction]
    positive_divisor, negative_divisor = positive_divisor.clamp(min=1), negative_divisor.clamp(min=1)
    loss = positive_loss / positive_divisor + negative_loss / negative_divisor
    if with_gradient:
        slopes = 2 * beyond if squared else (beyond > 0).to(dtype)
        pulls = pairs.pull(slopes / positive_divisor.to(dtype), d, distance)
        grad = torch.where(loss.isnan(), torch.nan, grad / negative_divisor.to(dtype) + pulls)
    result = ContrastiveResult(
        loss.to(dtype),
        *(count.nan_to_num().long() for count in (positives, negatives_, active_positives, active_negatives)),
        (d_positive / positives.clamp(min=1)).to(dtype),
        (d_negative / negatives_.clamp(min=1)).to(dtype),
    )
    return RankResult(result, grad if with_gradient else None)


def _negative_sums(loss: Tensor, counts: Tensor, means: Tensor) -> Tensor:
    """float64 [4] from what the op returns."""
    pairs, active = counts[1].double(), counts[3].double()
    return torch.stack([loss.double(), pairs, active, means[1].double() * pairs])
