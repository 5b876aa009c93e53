"""Batch-hard mining and loss over all ranks: half the ring for the choice, then the chosen rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch_hard_extremes import batch_hard_extremes
from ._batches import Batches
from ._center import common_center
from ._lists import farther_negatives, hardest_positives
from ._pairs import Pairs
from ._positives import positive_pairs
from ._result import Mined, RankResult
from ._ring import Meeting, go_round
from ._strategies import mine_by_strategy
from ._triplets import loss_of_triplets

# As csrc/common/choose_again.h has it: a choice whose |a - b|^2 / 2 is less than this much of |a|^2 / 2.
LOST_DIGITS = 1 / 512
_NOBODY = torch.iinfo(torch.int64).max  # an index that every other is below


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


def mine(
    x: Tensor, labels: Tensor, batches: Batches, *, positive: str, negative: str, distance: str
) -> Mined:
    """The same choice for any number of ranks, the lowest global index on ties."""
    if positive == negative == "hard":
        return _mine_hardest(x, labels, batches, distance=distance)
    return mine_by_strategy(x, labels, batches, positive=positive, negative=negative, distance=distance)


def _mine_hardest(x: Tensor, labels: Tensor, batches: Batches, *, distance: str) -> Mined:
    center = common_center(x, batches, distance)

    def as_larger_is_better(half_squares: Tensor, indices: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        indices = torch.where(indices < 0, _NOBODY, indices.long() + offset)
        return torch.stack([half_squares[0], -half_squares[1]]), indices

    half_squares, indices, half_norms, _, _ = batch_hard_extremes(x, labels, center=center, distance=distance)
    best = _Best(*as_larger_is_better(half_squares, indices, batches.offset))

    def visit(meeting: Meeting, theirs: Tensor) -> Sequence[Tensor]:
        their_labels = batches.labels[batches.rows(meeting.other)][meeting.theirs]
        own, own_labels = x[meeting.mine], labels[meeting.mine]
        block = own, own_labels, theirs, their_labels
        found = batch_hard_extremes(*block, center=center, distance=distance)
        first_of_theirs = batches.offsets[meeting.other] + meeting.theirs.start
        of_mine, of_theirs = found[:2], found[3:]
        best.improve(meeting.mine, *as_larger_is_better(*of_mine, first_of_theirs))
        return as_larger_is_better(*of_theirs, batches.offset + meeting.mine.start)

    def expect(count: int) -> Sequence[Tensor]:
        return half_squares.new_empty(2, count), labels.new_empty(2, count)

    def collect(_: int, mine: slice, found: Sequence[Tensor]) -> None:
        best.improve(mine, *found)

    go_round(x, batches, visit, expect, collect, once=True)
    _choose_again(best, half_norms, x, labels, batches, center, distance)
    valid = (best.index != _NOBODY).all(dim=0)
    positives, negatives = torch.where(valid, best.index, -1)
    return Mined(positives, negatives, ~best.value.isnan().any())


def _choose_again(
    best: _Best,
    half_norms: Tensor,
    x: Tensor,
    labels: Tensor,
    batches: Batches,
    center: Tensor,
    distance: str,
) -> None:
    """By differences, for anchors whose choice has lost its digits in the tiles' subtraction."""
    half_squares = torch.stack([best.value[0], -best.value[1]])
    lost = (half_squares < half_norms * LOST_DIGITS) & (best.index != _NOBODY)
    anywhere = lost.any(dim=1).long()
    dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=batches.group)
    positives_are, negatives_are = anywhere.tolist()
    if positives_are:
        mine, others = positive_pairs(batches)
        concerned = lost[0][mine]
        mine, others = mine[concerned], others[concerned]
        d = Pairs(x, mine, others, batches).distances(distance)
        everyone = torch.full_like(half_norms, torch.inf)
        best.index[0] = torch.where(lost[0], hardest_positives(mine, others, d, everyone)[1], best.index[0])
    if negatives_are:
        rows = torch.nonzero(lost[1]).squeeze(1)
        one_each = torch.arange(len(rows) + 1, device=x.device)
        nearest = half_norms.new_full((len(rows),), -1.0)  # of all
        anchors = x[rows], labels[rows]
        found = farther_negatives(*anchors, x, batches, one_each, nearest, center=center, distance=distance)
        best.index[1, rows] = found.nearest_index


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
    mined = mine(x, labels, batches, positive=positive, negative=negative, distance=distance)
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
