"""Mining over all ranks by other strategies than the hardest of both: positives by lists, negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from ._batches import Batches
from ._center import common_center
from ._lists import farther_negatives, hardest_positives, lists_of_positives
from ._result import Mined


def mine_by_strategy(
    x: Tensor, labels: Tensor, batches: Batches, *, positive: str, negative: str, distance: str
) -> Mined:
    """The strategies are those of `deepsim_ext.batch_hard_mine`; the lowest global index on ties."""
    center = common_center(x, batches, distance)
    lists = lists_of_positives(x, labels, batches, center=center, distance=distance)
    pairs = lists.mine, lists.others, lists.distances
    one_each = torch.arange(len(x) + 1, device=x.device)
    limits = lists.distances.new_full((len(x),), -1.0)  # the nearest of all
    if positive != "semihard":
        everyone = torch.full_like(limits, torch.inf)
        d_ap, positives = hardest_positives(*pairs, everyone, nearest=positive == "easy")
        if negative == "semihard":
            limits = torch.where(positives < 0, limits, d_ap)
    found = farther_negatives(x, labels, x, batches, one_each, limits, center=center, distance=distance)
    easy = negative == "easy"
    negatives = found.farthest_index if easy else found.nearest_index
    if positive == "semihard":
        _, positives = hardest_positives(*pairs, found.farthest if easy else found.nearest)
    valid = (positives >= 0) & (negatives >= 0)
    finite = ~found.farthest.isnan().any()
    return Mined(torch.where(valid, positives, -1), torch.where(valid, negatives, -1), finite)
