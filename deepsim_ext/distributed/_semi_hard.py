"""Semi-hard loss over all ranks: a round of the ring for the positives, one for their negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _batch_all
from ._batches import Batches
from ._center import common_center
from ._lists import farther_negatives, lists_of_positives
from ._result import RankResult
from ._triplets import loss_of_triplets


def ring_loss(
    x: Tensor,
    labels: Tensor,
    batches: Batches,
    *,
    margin: float,
    soft: bool,
    definition: str,
    distance: str,
    reduction: str,
    with_gradient: bool,
) -> RankResult:
    if definition == "pml":
        return _batch_all.loss_of_window(
            x,
            labels,
            batches,
            margin=margin,
            semi_hard=True,
            distance=distance,
            reduction=reduction,
            with_gradient=with_gradient,
        )
    center = common_center(x, batches, distance)
    lists = lists_of_positives(x, labels, batches, center=center, distance=distance)
    found = farther_negatives(
        x, labels, x, batches, lists.begin, lists.distances, center=center, distance=distance
    )
    has_negative = found.farthest_index >= 0
    negatives = torch.where(found.nearest_index >= 0, found.nearest_index, found.farthest_index[lists.mine])
    counted = has_negative[lists.mine]
    return loss_of_triplets(
        x,
        lists.mine[counted],
        lists.others[counted],
        negatives[counted],
        batches,
        valid_anchors=(has_negative & (lists.lengths > 0)).sum(),
        finite=~found.farthest.isnan().any(),
        margin=margin,
        soft=soft,
        distance=distance,
        reduction=reduction,
        with_gradient=with_gradient,
    )
