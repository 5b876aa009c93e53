"""Batch-hard mining and loss over all ranks: half the ring for the choice, then the chosen rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._batches import Batches
from ._center import common_center
from ._result import RankResult
from ._ring import Meeting, go_round
from ._triplets import loss_of_triplets

_ops = torch.ops.deepsim_ext
_NOBODY = torch.iinfo(torch.int64).max  # an index that every other is below


class Mined(NamedTuple):
    """Of every row of this rank."""

    positives: Tensor  # int64 [n], global index of the hardest; -1 where the anchor lacks either
    negatives: Tensor
    finite: Tensor  # bool: no NaN or inf here, nor in what was met, nor rows too long for their squares


class _Best:
    """The best [2, n] so far, positives and negatives, as values of which the larger is better."""

    def __init__(self, half_squares: Tensor, indices: Tensor) -> None:
        self.value, self.index = half_squares, indices

    def improve(self, mine: slice, value: Tensor, index: Tensor) -> None:
        """By candidates for rows `mine`: the larger wins, then the lower index. NaN stays."""
        best, best_index = self.value[:, mine], self.index[:, mine]
        better = (value > best) | ((value == best) & (index < best_index)) | value.isnan()
        self.value[:, mine] = torch.where(better, value, best)
        self.index[:, mine] = torch.where(better, index, best_index)


def mine(x: Tensor, labels: Tensor, batches: Batches, *, distance: str) -> Mined:
    """The same choice for any number of ranks, the lowest global index on ties."""
    center = common_center(x, batches, distance)

    def as_larger_is_better(half_squares: Tensor, indices: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        indices = torch.where(indices < 0, _NOBODY, indices.long() + offset)
        return torch.stack([half_squares[0], -half_squares[1]]), indices

    half_squares, indices, half_norms, _, _ = _ops.batch_hard_extremes(
        x, labels, None, None, center, distance
    )
    best = _Best(*as_larger_is_better(half_squares, indices, batches.offset))

    def visit(meeting: Meeting, theirs: Tensor) -> Sequence[Tensor]:
        their_labels = batches.labels[batches.rows(meeting.other)][meeting.theirs]
        own, own_labels = x[meeting.mine], labels[meeting.mine]
        found = _ops.batch_hard_extremes(own, own_labels, theirs, their_labels, center, distance)
        first_of_theirs = batches.offsets[meeting.other] + meeting.theirs.start
        best.improve(meeting.mine, *as_larger_is_better(found[0], found[1], first_of_theirs))
        return as_larger_is_better(found[3], found[4], batches.offset + meeting.mine.start)

    def expect(count: int) -> Sequence[Tensor]:
        return half_squares.new_empty(2, count), labels.new_empty(2, count)

    def collect(_: int, mine: slice, found: Sequence[Tensor]) -> None:
        best.improve(mine, *found)

    go_round(x, batches, visit, expect, collect, once=True)
    valid = (best.index != _NOBODY).all(dim=0)
    positives, negatives = torch.where(valid, best.index, -1)
    return Mined(positives, negatives, ~best.value.isnan().any())


def ring_loss(
    x: Tensor,
    labels: Tensor,
    batches: Batches,
    *,
    positive: str,
    negative: str,
    margin: float,
    soft: bool,
    distance: str,
    reduction: str,
    with_gradient: bool,
) -> RankResult:
    mined = mine(x, labels, batches, distance=distance)
    anchors = torch.nonzero(mined.positives >= 0).squeeze(1)
    return loss_of_triplets(
        x,
        anchors,
        mined.positives[anchors],
        mined.negatives[anchors],
        batches,
        valid_anchors=(mined.positives >= 0).sum(),
        finite=mined.finite,
        margin=margin,
        soft=soft,
        distance=distance,
        reduction=reduction,
        with_gradient=with_gradient,
    )
