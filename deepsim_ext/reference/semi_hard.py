"""Semi-hard: negatives that are farther than the positive, but not by much."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._checks import compute_dtype
from ..results import TripletLossResult
from .batch_all import batch_all_statistics, dense_batch_all
from .distances import all_distances
from .finite import nan_unless_finite
from .triplets import Triplets, first_argmax, has_both, pairs_by_label, reduce, triplet_terms, with_statistics


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
    """Triplet loss `relu(d_ap - d_an + margin)` with semi-hard negatives.

    "facenet": every ordered pair of an anchor and one of its positives, with the nearest of the negatives
    that are farther than the positive (d_an > d_ap) or, where none is, with the farthest negative. Source:
    Schroff, Kalenichenko, Philbin, "FaceNet: A Unified Embedding for Face Recognition and Clustering" (2015),
    section 3.2, in the form of TensorFlow Addons' triplet_semihard_loss.

    "pml": every triplet with 0 < d_an - d_ap <= margin. Source: TripletMarginMiner of pytorch-metric-learning
    with type_of_triplets="semihard".

    Args:
        embeddings, labels, ref_embeddings, ref_labels, distance: as in `batch_all_triplet_loss`.
        margin: finite, >= 0, in units of the distance; not used when `soft`.
        soft: `softplus(d_ap - d_an)` instead; not with "pml".
        definition: "facenet", which may also be called "tfa", or "pml". Of equally far negatives "facenet"
            takes the one of the lowest index.
        reduction: "mean" over the triplets, "mean_nonzero" over those whose loss is > 0, or "sum". The mean
            of nothing is 0.
        return_stats: return a `TripletLossResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar; float32, or float64 for float64 input. Half inputs are computed in float32.
        Gradients flow into both embeddings; that of a Euclidean distance is 0 at 0, and that of a cosine
        distance is 0 at a zero vector. A NaN or inf in an embedding makes the loss NaN.

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
        loss = dense_batch_all(*arguments, margin, True, distance, reduction)
        return batch_all_statistics(loss, *arguments, margin, True, distance) if return_stats else loss
    loss = dense_semi_hard(*arguments, margin, soft, distance, reduction)
    return _statistics(loss, *arguments, margin, soft, distance) if return_stats else loss


def dense_semi_hard(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    soft: bool,
    distance: str,
    reduction: str,
) -> Tensor:
    """The loss of `batch_semi_hard_triplet_loss` by the definition "facenet", on checked arguments.

    Differentiable to any order. It builds an [N, M, D] tensor.
    """
    triplets = _semi_hard_triplets(embeddings, labels, ref_embeddings, ref_labels, margin, soft, distance)
    loss = reduce(triplets.loss, triplets.counted, reduction)
    return nan_unless_finite(loss, embeddings, ref_embeddings)


@torch.no_grad()
def _statistics(
    loss: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    soft: bool,
    distance: str,
) -> TripletLossResult:
    triplets = _semi_hard_triplets(embeddings, labels, ref_embeddings, ref_labels, margin, soft, distance)
    valid_anchors = has_both(*pairs_by_label(labels, ref_labels)).sum()
    return with_statistics(loss, triplets, valid_anchors, embeddings, ref_embeddings)


def _semi_hard_triplets(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    margin: float,
    soft: bool,
    distance: str,
) -> Triplets:
    """One triplet for every (anchor, row), [N, M]; counted where the row is a positive."""
    positive, negative = pairs_by_label(labels, ref_labels)
    counted = positive & negative.any(dim=1, keepdim=True)
    d = all_distances(embeddings, ref_embeddings, compute_dtype(embeddings), distance)
    chosen = _choose(embeddings, ref_embeddings, negative, distance)
    return triplet_terms(d, d.gather(1, chosen.clamp(min=0)), counted, margin, soft)


@torch.no_grad()
def _choose(embeddings: Tensor, ref_embeddings: Tensor | None, negative: Tensor, distance: str) -> Tensor:
    """int64 [N, M]: the negative of anchor a if row p is its positive; -1 if there is none, or only NaN.

    Distances are float64 direct differences: the exact choice for any input dtype.
    """
    d = all_distances(embeddings, ref_embeddings, torch.float64, distance)
    # Negatives in order of distance, the lowest index first among equals; what is no negative comes last.
    ascending, order = torch.where(negative, d, torch.inf).sort(dim=1, stable=True)
    farther = torch.searchsorted(ascending, d, right=True)  # position of the first with d_an > d_ap
    found = farther < negative.sum(dim=1, keepdim=True)
    nearest_farther = order.gather(1, torch.where(found, farther, 0))
    return torch.where(found, nearest_farther, first_argmax(d, negative)[:, None])
