"""Triplet loss of given triplets: elementwise in the triplets, so plain torch is all it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _checks
from .reference.distances import rowwise, unit_rows, zero_rows


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

    Source: Schroff, Kalenichenko, Philbin, "FaceNet: A Unified Embedding for Face Recognition and Clustering"
    (2015), eq. 3, which is the default on embeddings of length 1. The swap is of Balntas, Riba, Ponsa,
    Mikolajczyk, "Learning local feature descriptors with triplets and shallow convolutional neural networks"
    (2016), section 3.3; the soft margin of Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person
    Re-Identification" (2017), section 2.

    Args:
        anchor, positive, negative: [T, D] embeddings with D >= 1, one triplet a row; float32, float64,
            bfloat16 or float16. Under autocast their dtypes may differ and go to the widest.
        margin: finite, >= 0, in units of the distance; not used when `soft`.
        swap: let d_pn, the distance of positive and negative, stand for d_an where it is smaller.
        soft: the soft margin.
        distance: "sqeuclidean", "euclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).
        reduction: "mean" over triplets, "mean_nonzero" over triplets whose loss is > 0, "sum", or "none" for
            [T]. The mean of nothing is 0.

    Returns:
        Scalar, or [T] for "none"; float32, or float64 for float64 input. Half inputs are compared in float32.
        Differentiable to any order; the gradient of a Euclidean distance is 0 at 0, and that of a cosine
        distance is 0 at a zero vector. A NaN or inf in a triplet makes its loss NaN.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance or reduction, negative or non-finite margin, or shapes or devices that do
            not go together.
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
    dtype = _checks.compute_dtype(a)
    rows = [x.to(dtype) for x in (a, p, n)]
    between = _distances(rows, distance)
    d_an = between(0, 2)
    if swap:
        d_an = torch.minimum(d_an, between(1, 2))
    gap = between(0, 1) - d_an
    # Beyond the threshold softplus(z) is taken to be z; exp(-40) is below the rounding of a float64.
    loss = torch.nn.functional.softplus(gap, threshold=40) if soft else (gap + margin).relu()
    # Looked for in the embeddings: relu hides a negative that is infinitely far. Extremes of NaN are NaN.
    with torch.no_grad():
        extremes = torch.stack([extreme(x, dim=1) for x in rows for extreme in (torch.amin, torch.amax)])
        finite = extremes.isfinite().all(dim=0)
    loss = torch.where(finite, loss, torch.nan)
    if reduction == "none":
        return loss
    if reduction == "mean_nonzero":
        return loss.sum() / (loss > 0).sum().clamp(min=1)
    return loss.sum() / max(loss.shape[0], 1) if reduction == "mean" else loss.sum()


def _distances(rows: Sequence[Tensor], distance: str) -> Callable[[int, int], Tensor]:
    """The distances between the rows of two of some tensors, each of which is scaled once."""
    if distance != "cosine":
        return lambda i, j: rowwise(rows[i], rows[j], distance)
    units, zero = [unit_rows(x) for x in rows], [zero_rows(x) for x in rows]
    # As `rowwise` has it.
    return lambda i, j: torch.where(zero[i] | zero[j], 1.0, rowwise(units[i], units[j], "sqeuclidean") / 2)
