"""Lists of positives wherever they are, and what the blocks of all ranks hold against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import compute_dtype
from ..positive_distances import positive_distances
from ..semi_hard_negatives import semi_hard_negatives
from ._batches import Batches
from ._positives import positive_pairs
from ._ring import Meeting, go_round

_NOBODY = torch.iinfo(torch.int64).max  # an index that every other is below


class Lists(NamedTuple):
    """All pairs of a row of this rank and another of its label, ascending by row, then by global index."""

    mine: Tensor  # int64 [P], rows of this rank
    others: Tensor  # int64 [P], global indices
    begin: Tensor  # int64 [n + 1]: where each row's pairs begin
    distances: Tensor  # [P], as the search for negatives measures them

    @property
    def lengths(self) -> Tensor:
        return self.begin.diff()


class Farther(NamedTuple):
    """Of all ranks' rows; an index is a global one, -1 where there is none."""

    nearest: Tensor  # [P]: inf where there is none
    nearest_index: Tensor
    farthest: Tensor  # [n]: -inf where there is none
    farthest_index: Tensor


def lists_of_positives(
    x: Tensor, labels: Tensor, batches: Batches, *, center: Tensor, distance: str
) -> Lists:
    """One round of the ring: tiles of every block measure, so that equal rows are at equal distances."""
    mine, others = positive_pairs(batches)
    begin = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    begin[1:] = torch.bincount(mine, minlength=len(x)).cumsum(0)
    distances = torch.empty(len(mine), dtype=compute_dtype(x), device=x.device)

    def of_rank(rank: int) -> Tensor:
        return (others >= batches.offsets[rank]) & (others < batches.offsets[rank + 1])

    def visit(meeting: Meeting, theirs: Tensor) -> Sequence[Tensor]:
        their_labels = batches.labels[batches.rows(meeting.other)]
        found = positive_distances(x, labels, theirs, their_labels, center=center, distance=distance)
        distances[of_rank(meeting.other)] = found
        return ()

    distances[of_rank(batches.rank)] = positive_distances(x, labels, center=center, distance=distance)
    go_round(x, batches, visit, once=False)
    return Lists(mine, others, begin, distances)


def hardest_positives(
    mine: Tensor, others: Tensor, distances: Tensor, limits: Tensor, *, nearest: bool = False
) -> tuple[Tensor, Tensor]:
    """Every row's farthest (nearest) positive below its limit [n]: distance; global index, -1 for none."""
    sign = -1 if nearest else 1
    allowed = distances < limits[mine]
    mine, others, value = mine[allowed], others[allowed], sign * distances[allowed]
    best = torch.full_like(limits, -torch.inf).scatter_reduce(0, mine, value, "amax")
    ties = value == best[mine]
    index = torch.full_like(limits, _NOBODY, dtype=torch.int64)
    index = index.scatter_reduce(0, mine[ties], others[ties], "amin")
    return sign * best, torch.where(index == _NOBODY, -1, index)


def farther_negatives(
    anchors: Tensor,
    anchor_labels: Tensor,
    x: Tensor,
    batches: Batches,
    begin: Tensor,
    limits: Tensor,
    *,
    center: Tensor,
    distance: str,
) -> Farther:
    """For anchors among the rows x [n, D] of this rank: the nearest of all negatives beyond each of the
    limits, and every anchor's farthest; lists as the op's."""

    def search(rank: int, rows: Tensor) -> tuple[Tensor, ...]:
        block = rows, batches.labels[batches.rows(rank)]
        own = anchors, anchor_labels
        found = semi_hard_negatives(*own, *block, begin, limits, center=center, distance=distance)
        nearest, nearest_index, farthest, farthest_index = found
        indices = [
            torch.where(index < 0, _NOBODY, index.long() + batches.offsets[rank])
            for index in (nearest_index, farthest_index)
        ]
        return nearest, indices[0], -farthest, indices[1]

    best = search(batches.rank, x)

    def visit(meeting: Meeting, theirs: Tensor) -> Sequence[Tensor]:
        found = search(meeting.other, theirs)
        for k in (0, 2):
            (value, index), (known, known_index) = found[k : k + 2], best[k : k + 2]
            better = (value < known) | ((value == known) & (index < known_index)) | value.isnan()
            known[better], known_index[better] = value[better], index[better]
        return ()

    go_round(x, batches, visit, once=False)
    nearest, nearest_index, farthest, farthest_index = best
    indices = [torch.where(index == _NOBODY, -1, index) for index in (nearest_index, farthest_index)]
    return Farther(nearest, indices[0], -farthest, indices[1])
