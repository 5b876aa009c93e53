"""Mining over all ranks by strategies other than the hardest of both: positives from lists, then negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ._batches import Batches
from ._center import common_center
from ._lists import Lists, farther_negatives, lists_of_positives


def mine_by_strategy(
    x: Tensor, labels: Tensor, batches: Batches, *, positive: str, negative: str, distance: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Positives and negatives int64 [n], global indices, -1 where the anchor lacks either; and whether finite.

    The strategies are those of `deepsim_ext.batch_hard_mine`; the lowest global index on ties.
    """
    center = common_center(x, batches, distance)
    lists = lists_of_positives(x, labels, batches, center=center, distance=distance)
    one_each = torch.arange(len(x) + 1, device=x.device)
    limits = lists.distances.new_full((len(x),), -1.0)  # the nearest of all
    if positive != "semihard":
        d_ap, positives = _choose(lists, limits.new_full((len(x),), torch.inf), nearest=positive == "easy")
        if negative == "semihard":
            limits = torch.where(positives < 0, limits, d_ap)
    found = farther_negatives(x, labels, batches, one_each, limits, center=center, distance=distance)
    easy = negative == "easy"
    negatives = found.farthest_index if easy else found.nearest_index
    if positive == "semihard":
        _, positives = _choose(lists, found.farthest if easy else found.nearest, nearest=False)
    valid = (positives >= 0) & (negatives >= 0)
    return torch.where(valid, positives, -1), torch.where(valid, negatives, -1), ~found.farthest.isnan().any()


def _choose(lists: Lists, limits: Tensor, *, nearest: bool) -> tuple[Tensor, Tensor]:
    """Every row's farthest (nearest) positive below its limit: distance, and global index, -1 for none."""
    sign = -1 if nearest else 1
    allowed = lists.distances < limits[lists.mine]
    mine, others = lists.mine[allowed], lists.others[allowed]
    value = sign * lists.distances[allowed]
    best = torch.full_like(limits, -torch.inf).scatter_reduce(0, mine, value, "amax")
    ties = value == best[mine]
    nobody = torch.iinfo(torch.int64).max
    index = torch.full_like(limits, nobody, dtype=torch.int64)
    index = index.scatter_reduce(0, mine[ties], others[ties], "amin")
    return sign * best, torch.where(index == nobody, -1, index)
