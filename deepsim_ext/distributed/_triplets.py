"""Losses of chosen triplets, wherever their rows are: sums over all ranks, and the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.triplets import triplet_loss
from ..results import TripletLossResult
from ._batches import Batches, add_up
from ._pairs import Pairs
from ._result import RankResult


def loss_of_triplets(
    x: Tensor,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    batches: Batches,
    *,
    valid_anchors: Tensor,
    finite: Tensor,
    margin: float,
    soft: bool,
    distance: str,
    reduction: str,
    with_gradient: bool,
) -> RankResult:
    """The loss of every rank's triplets: int64 [T] rows of this rank, and global indices.

    valid_anchors and finite are of this rank: how many anchors are valid, and whether all could be compared.
    """
    count = len(anchors)
    pairs = Pairs(x, torch.cat([anchors, anchors]), torch.cat([positives, negatives]), batches)
    d = pairs.distances(distance)
    d_ap, d_an = d[:count], d[count:]
    gap = (d_ap - d_an).requires_grad_()
    with torch.enable_grad():
        losses = triplet_loss(gap, torch.zeros_like(gap), margin, soft)
    (slopes,) = torch.autograd.grad(losses, gap, torch.ones_like(losses))
    losses = losses.detach()
    # Counts are exact in float64, too: one exchange for all.
    sums = torch.stack(
        [
            losses.double().sum(),
            d_ap.double().sum(),
            d_an.double().sum(),
            valid_anchors.double(),
            torch.tensor(float(count), dtype=torch.float64, device=x.device),
            (losses > 0).sum().double(),
        ]
    )
    total, sum_ap, sum_an, valid, triplets, active = add_up(torch.where(finite, sums, torch.nan), batches)
    divisor = {"sum": torch.ones_like(triplets), "mean": triplets, "mean_nonzero": active}[reduction]
    divisor = divisor.clamp(min=1)
    grad = None
    if with_gradient:
        weights = (slopes / divisor).to(slopes.dtype)
        grad = pairs.pull(torch.cat([weights, -weights]), d, distance)
        grad = torch.where(total.isnan(), torch.nan, grad)
    dtype = d_ap.dtype
    divided = triplets.clamp(min=1)
    return RankResult(
        TripletLossResult(
            loss=(total / divisor).to(dtype),
            valid_anchors=valid.nan_to_num().long(),
            triplets=triplets.nan_to_num().long(),
            active_triplets=active.nan_to_num().long(),
            active_fraction=(active / divided).to(dtype),
            mean_d_ap=(sum_ap / divided).to(dtype),
            mean_d_an=(sum_an / divided).to(dtype),
        ),
        grad,
    )
