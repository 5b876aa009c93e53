"""Losses of given pairs and given triplets."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .distances import rowwise
from .triplets import reduce, triplet_loss


def contrastive_loss(
    x1: Tensor, x2: Tensor, y: Tensor, *, margin: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Contrastive loss `y d^2 + (1 - y) relu(margin - d)^2` of given pairs.

    Arguments, result and errors are those of `deepsim_ext.functional.contrastive_loss`.
    """
    x1, x2, y, margin = _checks.contrastive("contrastive_loss", x1, x2, y, margin=margin, reduction=reduction)
    dtype = _checks.compute_dtype(x1)
    d = rowwise(x1.to(dtype), x2.to(dtype), "euclidean")
    d2 = rowwise(x1.to(dtype), x2.to(dtype), "sqeuclidean")
    loss = y * d2 + (1 - y) * (margin - d).relu() ** 2
    loss = torch.where(d2.isfinite() & (y >= 0) & (y <= 1), loss, torch.nan)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" or len(loss) == 0 else loss.mean()


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float = 0.2,
    swap: bool = False,
    soft: bool = False,
    distance: str = "sqeuclidean",
    reduction: str = "mean",
) -> Tensor:
    """Triplet loss of given triplets: `relu(d_ap - d_an + margin)`, or `softplus(d_ap - d_an)` when `soft`.

    Arguments, result and errors are those of `deepsim_ext.functional.triplet_margin_loss`.
    """
    a, p, n, margin = _checks.triplet_margin(
        "triplet_margin_loss",
        anchor,
        positive,
        negative,
        margin=margin,
        swap=swap,
        soft=soft,
        distance=distance,
        reduction=reduction,
    )
    a, p, n = (x.to(_checks.compute_dtype(x)) for x in (a, p, n))
    d_ap, d_an = rowwise(a, p, distance), rowwise(a, n, distance)
    if swap:
        d_an = torch.minimum(d_an, rowwise(p, n, distance))
    finite = torch.cat([a, p, n], dim=1).isfinite().all(dim=1)
    loss = torch.where(finite, triplet_loss(d_ap, d_an, margin, soft), torch.nan)
    return reduce(loss, torch.ones_like(finite), reduction)
