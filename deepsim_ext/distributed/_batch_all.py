"""Batch-all loss over all ranks: a round of the ring for the positives, one for what negatives add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch_all_negatives import batch_all_negatives
from ..results import TripletLossResult
from ._batches import Batches, add_up
from ._center import common_center
from ._lists import lists_of_positives
from ._pairs import Pairs
from ._result import RankResult
from ._ring import Meeting, go_round


def ring_loss(
    x: Tensor,
    labels: Tensor,
    batches: Batches,
    *,
    margin: float,
    distance: str,
    reduction: str,
    with_gradient: bool,
) -> RankResult:
    return loss_of_window(
        x,
        labels,
        batches,
        margin=margin,
        semi_hard=False,
        distance=distance,
        reduction=reduction,
        with_gradient=with_gradient,
    )


def loss_of_window(
    x: Tensor,
    labels: Tensor,
    batches: Batches,
    *,
    margin: float,
    semi_hard: bool,
    distance: str,
    reduction: str,
    with_gradient: bool,
) -> RankResult:
    """All triplets or, if `semi_hard`, those with d_ap < d_an <= d_ap + margin."""
    center = common_center(x, batches, distance)
    lists = lists_of_positives(x, labels, batches, center=center, distance=distance)

    def negatives(rank: int, rows: Tensor) -> tuple[Tensor, ...]:
        return batch_all_negatives(
            x,
            labels,
            rows,
            batches.labels[batches.rows(rank)],
            lists.begin,
            lists.distances,
            margin=margin,
            semi_hard=semi_hard,
            center=center,
            distance=distance,
            with_gradient=with_gradient,
        )

    sums, active, grad, grad_of_block = negatives(batches.rank, x)
    grad += grad_of_block

    def visit(meeting: Meeting, theirs: Tensor) -> Sequence[Tensor]:
        for total, part in zip((sums, active, grad), found := negatives(meeting.other, theirs), strict=False):
            total += part
        return (found[3],) if with_gradient else ()

    def expect(count: int) -> Sequence[Tensor]:
        return (grad.new_empty(count, x.shape[1]),) if with_gradient else ()

    def collect(_: int, mine: slice, found: Sequence[Tensor]) -> None:
        for part in found:
            grad[mine] += part

    go_round(x, batches, visit, expect, collect, once=False)

    d, n = lists.distances.double(), active.double()
    negatives_of_row = batches.offsets[-1] - lists.lengths - 1
    per_pair = n if semi_hard else negatives_of_row[lists.mine].double()
    valid = ((lists.lengths > 0) & (negatives_of_row > 0)).sum()
    own = [(n * (d + margin)).sum(), n.sum(), (d * per_pair).sum(), valid.double()]
    total = add_up(torch.cat([torch.stack(own), sums]), batches)
    limits, active_triplets, d_ap, valid_anchors, triplets, with_loss, d_an, active_d_an = total
    if semi_hard:  # those without a loss have d_ap = d_an - margin
        d_ap = d_ap + d_an - active_d_an - (triplets - with_loss) * margin
    one = torch.ones_like(triplets)
    divisor = {"sum": one, "mean": triplets, "mean_nonzero": active_triplets}[reduction].clamp(min=1)
    loss = (limits - active_d_an).clamp(min=0) / divisor
    if with_gradient:
        pairs = Pairs(x, lists.mine, lists.others, batches)
        pulls = pairs.pull((active / divisor).to(active.dtype), lists.distances, distance)
        grad = (grad / divisor).to(grad.dtype) + pulls
        grad = torch.where(loss.isnan(), torch.nan, grad)
    dtype, count = active.dtype, triplets.clamp(min=1)
    return RankResult(
        TripletLossResult(
            loss=loss.to(dtype),
            valid_anchors=valid_anchors.nan_to_num().long(),
            triplets=triplets.nan_to_num().long(),
            active_triplets=active_triplets.nan_to_num().long(),
            active_fraction=(active_triplets / count).to(dtype),
            mean_d_ap=(d_ap / count).to(dtype),
            mean_d_an=(d_an / count).to(dtype),
        ),
        grad if with_gradient else None,
    )
