"""Semi-hard triplet losses: negatives farther than the positive, but not by much."""

from __future__ import annotations

from torch import Tensor

from . import _checks, reference
from ._loss_with_gradient import loss_with_gradient
from .batch_all import triplet_loss_result, triplets_by_window
from .results import TripletLossResult


def batch_semi_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin: float = 0.2,
    soft: bool = False,
    definition: str = "facenet",
    distance: str = "euclidean",
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | TripletLossResult:
    """Triplet loss `relu(d_ap - d_an + margin)` with semi-hard negatives, without an N x N matrix.

    By the definition "facenet" (or "tfa", which is the same) every ordered pair of an anchor and a positive
    takes the nearest negative that is farther than the positive, or, where none is, the farthest negative. By
    the definition "pml" all triplets with 0 < d_an - d_ap <= margin count. Source: Schroff, Kalenichenko,
    Philbin, "FaceNet" (2015), section 3.2, as TensorFlow Addons' `triplet_semihard_loss` has it; the other is
    pytorch-metric-learning's `TripletMarginMiner(type_of_triplets="semihard")`.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, distance: as in `batch_hard_mine`.
        margin: finite, >= 0, in units of the distance; not used when `soft`.
        soft: `softplus(d_ap - d_an)` in place of the hinge; not for the definition "pml".
        definition: "facenet", "tfa" or "pml".
        reduction: "mean" over these triplets, "mean_nonzero" over those whose loss is > 0, or "sum". The mean
            of nothing is 0.
        return_stats: return a `TripletLossResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar; float32, or float64 for float64 input. Half inputs are computed in float32, their gradients
        come in the input's dtype. Gradients flow into both embeddings (the second derivative is computed in
        plain torch, with [N, N, D] or larger tensors); that of a Euclidean distance is 0 at 0, and that of a
        cosine distance is 0 at a zero vector. A NaN or inf in an embedding makes the loss NaN, and so do rows
        too long for their squares (1e18 in float32).

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown definition, distance or reduction, `soft` with "pml", negative or non-finite
            margin, or shapes or devices that do not go together.
    """
    function = "batch_semi_hard_triplet_loss"
    margin = _checks.semi_hard_options(
        function,
        margin=margin,
        soft=soft,
        definition=definition,
        distance=distance,
        reduction=reduction,
        return_stats=return_stats,
    )
    arguments = _checks.batch_hard(
        function, embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    if definition == "pml":
        result = triplets_by_window(*arguments, margin, True, distance, reduction)
    else:
        result = _next_farther(*arguments, margin, soft, distance, reduction)
    return triplet_loss_result(*result) if return_stats else result[0]


_next_farther = loss_with_gradient("batch_semi_hard_triplet_loss", 3, reference.dense_semi_hard)
