"""Batch-all: the loss of every triplet of a batch, or of those that are semi-hard."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._checks import compute_dtype
from ..results import TripletLossResult
from .distances import all_distances
from .finite import nan_unless_finite
from .triplets import Triplets, has_both, pairs_by_label, reduce, triplet_terms, with_statistics


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
    """Triplet loss `relu(d_ap - d_an + margin)` of every triplet: anchor a, positive p, negative n.

    p is any row of the anchor's label but the anchor itself, n any row of another label. Source: Hermans,
    Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017), eq. 6 ("batch all");
    with the mean over losses > 0 it is what they call batch all != 0.

    Args:
        embeddings: [N, D] with D >= 1; float32, float64, bfloat16 or float16.
        labels: int64 [N].
        ref_embeddings, ref_labels: [M, D] and int64 [M], the rows that positives and negatives are of; dtype
            of `embeddings` or, under autocast, a mix that goes to the widest. None, or `embeddings` itself:
            rows of the batch, where no anchor is its own positive; `ref_labels` then has no effect.
        margin: finite, >= 0, in units of the distance.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).
        reduction: "mean" over all triplets, "mean_nonzero" over those whose loss is > 0, or "sum". The mean
            of nothing is 0.
        return_stats: return a `TripletLossResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar; float32, or float64 for float64 input. Half inputs are computed in float32.
        Gradients flow into both embeddings; that of a Euclidean distance is 0 at 0, and that of a cosine
        distance is 0 at a zero vector. A NaN or inf in an embedding makes the loss NaN.

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
    loss = dense_batch_all(*arguments, margin, False, distance, reduction)
    return batch_all_statistics(loss, *arguments, margin, False, distance) if return_stats else loss


def dense_batch_all(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    semi_hard: bool,
    distance: str,
    reduction: str,
) -> Tensor:
    """The loss of `batch_all_triplet_loss` on checked arguments; differentiable to any order.

    With `semi_hard` only triplets with 0 < d_an - d_ap <= margin count: `batch_semi_hard_triplet_loss` by the
    definition "pml". It builds [N, M, D] and [N, M, M] tensors.
    """
    triplets = _all_triplets(embeddings, labels, ref_embeddings, ref_labels, margin, semi_hard, distance)
    loss = reduce(triplets.loss, triplets.counted, reduction)
    return nan_unless_finite(loss, embeddings, ref_embeddings)


@torch.no_grad()
def batch_all_statistics(
    loss: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    semi_hard: bool,
    distance: str,
) -> TripletLossResult:
    """`loss`, which is `dense_batch_all` of the same arguments, with the statistics of its triplets."""
    triplets = _all_triplets(embeddings, labels, ref_embeddings, ref_labels, margin, semi_hard, distance)
    valid_anchors = has_both(*pairs_by_label(labels, ref_labels)).sum()
    return with_statistics(loss, triplets, valid_anchors, embeddings, ref_embeddings)


def _all_triplets(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    semi_hard: bool,
    distance: str,
) -> Triplets:
    """All (anchor, row, row), [N, M, M]; counted are those that are (anchor, positive, negative)."""
    positive, negative = pairs_by_label(labels, ref_labels)
    counted = positive[:, :, None] & negative[:, None, :]
    if semi_hard:
        counted = counted & _in_margin(embeddings, ref_embeddings, margin, distance)
    d = all_distances(embeddings, ref_embeddings, compute_dtype(embeddings), distance)
    return triplet_terms(d[:, :, None], d[:, None, :], counted, margin, soft=False)


@torch.no_grad()
def _in_margin(embeddings: Tensor, ref_embeddings: Tensor | None, margin: float, distance: str) -> Tensor:
    """bool [N, M, M]: 0 < d_an - d_ap <= margin, by float64 distances: exact for any input dtype."""
    d = all_distances(embeddings, ref_embeddings, torch.float64, distance)
    d_ap, d_an = d[:, :, None], d[:, None, :]
    return (d_an > d_ap) & (d_an - d_ap <= margin)
