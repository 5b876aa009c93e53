"""Batch-all triplet loss: all triplets of a batch, without a list of them."""

from __future__ import annotations

from torch import Tensor

from . import _checks, reference
from ._loss_with_gradient import loss_with_gradient
from .results import TripletLossResult


def batch_all_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin: float = 0.2,
    distance: str = "euclidean",
    reduction: str = "mean_nonzero",
    return_stats: bool = False,
) -> Tensor | TripletLossResult:
    """Triplet loss `relu(d_ap - d_an + margin)` of all triplets of an anchor, a positive and a negative.

    Source: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017), eq.
    6; it also proposes the mean over losses above 0. Every negative is held against its anchor's
    positives sorted by distance, so that time is O(N^2 (D + log K)), K = the largest class, and memory O(N D)
    and some tens of MiB.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, distance: as in `batch_hard_mine`.
        margin: finite, >= 0, in units of the distance.
        reduction: "mean_nonzero" over triplets whose loss is > 0, "mean" over all triplets, or "sum". The
            mean of nothing is 0.
        return_stats: return a `TripletLossResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar; float32, or float64 for float64 input. Half inputs are computed in float32, their gradients
        come in the input's dtype. Gradients flow into both embeddings (the second derivative is computed in
        plain torch, with [N, N, N] tensors); that of a Euclidean distance is 0 at 0, and that of a cosine
        distance is 0 at a zero vector. A NaN or inf in an embedding makes the loss NaN, and so do rows too
        long for their squares (1e18 in float32).

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance or reduction, negative or non-finite margin, or shapes or devices that do
            not go together.
    """
    function = "batch_all_triplet_loss"
    margin = _checks.batch_all_options(
        function, margin=margin, distance=distance, reduction=reduction, return_stats=return_stats
    )
    arguments = _checks.batch_hard(
        function, embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    result = triplets_by_window(*arguments, margin, False, distance, reduction)
    return triplet_loss_result(*result) if return_stats else result[0]


def triplet_loss_result(loss: Tensor, counts: Tensor, means: Tensor) -> TripletLossResult:
    """counts: valid anchors, triplets, active triplets; means: of d_ap and d_an."""
    valid_anchors, triplets, active_triplets = counts.unbind()
    mean_d_ap, mean_d_an = means.unbind()
    active_fraction = active_triplets.to(loss.dtype) / triplets.clamp(min=1)
    return TripletLossResult(
        loss=loss,
        valid_anchors=valid_anchors,
        triplets=triplets,
        active_triplets=active_triplets,
        active_fraction=active_fraction,
        mean_d_ap=mean_d_ap,
        mean_d_an=mean_d_an,
    )


# (embeddings, labels, ref_embeddings, ref_labels, margin, semi_hard, distance, reduction) -> loss, counts,
# means; semi_hard keeps to triplets with d_ap < d_an <= d_ap + margin.
triplets_by_window = loss_with_gradient("batch_all_triplet_loss", 3, reference.dense_batch_all)
