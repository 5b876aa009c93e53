"""Triplet loss of given triplets."""

from __future__ import annotations

from torch import Tensor

from . import _checks, reference
from ._given_rows import given_rows_loss


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
        distance is 0 at a zero vector. A NaN or inf in a triplet makes its loss and gradients NaN, and so do
        float64 rows too long for their squares (1e154).

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
    return _loss(a, p, n, margin, swap, soft, distance, reduction)


def _dense_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, swap: bool, soft: bool, *names: str
) -> Tensor:
    distance, reduction = names
    options = {"margin": margin, "swap": swap, "soft": soft, "distance": distance, "reduction": reduction}
    return reference.triplet_margin_loss(anchor, positive, negative, **options)


_loss = given_rows_loss("triplet_margin_loss", 3, lambda margin, swap, *_: 3 if swap else 2, _dense_loss)
