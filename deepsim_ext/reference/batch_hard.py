"""Batch-hard: every anchor with its hardest positive and its hardest negative, or with easier ones.

Mining and the loss of mined triplets are apart, so that the loss of given triplets can be differentiated to
any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._checks import compute_dtype
from ..results import TripletLossResult
from .distances import pairwise, rowwise
from .finite import all_finite, nan_unless_finite
from .triplets import Triplets, choose, pairs_by_label, reduce, triplet_terms, with_statistics


def batch_hard_mine(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    positive: str = "hard",
    negative: str = "hard",
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Hardest positive and hardest negative of every anchor that has both, or easier ones.

    Source: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017),
    eq. 5; the other strategies are those of pytorch-metric-learning's BatchEasyHardMiner.

    Args:
        embeddings: [N, D] with D >= 1; float32, float64, bfloat16 or float16.
        labels: int64 [N].
        ref_embeddings, ref_labels: [M, D] and int64 [M], the rows to choose from; dtype of `embeddings` or,
            under autocast, a mix that goes to the widest. None, or `embeddings` itself: choose from the
            batch, where no anchor is its own positive; `ref_labels` then has no effect.
        positive: "hard" is the farthest, "easy" the nearest, "semihard" the farthest that is nearer than the
            negative.
        negative: "hard" is the nearest, "easy" the farthest, "semihard" the nearest that is farther than the
            positive; not both "semihard".
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).

    Returns:
        (anchors, positives, negatives), int64 of one length, anchors ascending. Ties go to the lowest index.
        With a NaN or inf in the embeddings nothing is chosen.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown strategy or distance, both strategies "semihard", or shapes or devices that do not
            go together.
    """
    _checks.mining_strategies("batch_hard_mine", positive=positive, negative=negative)
    arguments = _checks.batch_hard(
        "batch_hard_mine", embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    positives, negatives = mine_triplets(*arguments, positive=positive, negative=negative, distance=distance)
    anchors = torch.nonzero(positives >= 0).squeeze(1)
    return anchors, positives[anchors], negatives[anchors]


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    positive: str = "hard",
    negative: str = "hard",
    margin: float = 0.2,
    soft: bool = False,
    distance: str = "euclidean",
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | TripletLossResult:
    """Triplet loss of every anchor with its hardest positive and hardest negative, or with easier ones.

    `relu(d_ap - d_an + margin)`, or `softplus(d_ap - d_an)` when `soft`. An anchor without such a positive or
    without such a negative is not valid and costs nothing. Source: Hermans, Beyer, Leibe, "In Defense of the
    Triplet Loss for Person Re-Identification" (2017), eq. 5; the soft margin is of its section 2.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, positive, negative, distance: as in `batch_hard_mine`.
        margin: finite, >= 0, in units of the distance; not used when `soft`.
        soft: the soft margin.
        reduction: "mean" over valid anchors, "mean_nonzero" over anchors whose loss is > 0, "sum", or "none"
            for [N] with 0 at anchors that are not valid. The mean of nothing is 0.
        return_stats: return a `TripletLossResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar, or [N] for "none"; float32, or float64 for float64 input. Half inputs are computed in float32.
        Gradients flow into both embeddings; that of a Euclidean distance is 0 at 0, and that of a cosine
        distance is 0 at a zero vector. A NaN or inf in an embedding makes the loss NaN.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown strategy, distance or reduction, both strategies "semihard", negative or
            non-finite margin, or shapes or devices that do not go together.
    """
    function = "batch_hard_triplet_loss"
    margin = _checks.batch_hard_options(
        function,
        positive=positive,
        negative=negative,
        margin=margin,
        soft=soft,
        distance=distance,
        reduction=reduction,
        return_stats=return_stats,
    )
    arguments = _checks.batch_hard(
        function, embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    positives, negatives = mine_triplets(*arguments, positive=positive, negative=negative, distance=distance)
    x, refs = arguments.embeddings, arguments.ref_embeddings
    triplets = _indexed_triplets(x, refs, positives, negatives, margin=margin, soft=soft, distance=distance)
    loss = nan_unless_finite(reduce(triplets.loss, triplets.counted, reduction), x, refs)
    return with_statistics(loss, triplets, triplets.counted.sum(), x, refs) if return_stats else loss


@torch.no_grad()
def mine_triplets(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    *,
    positive: str = "hard",
    negative: str = "hard",
    distance: str,
) -> tuple[Tensor, Tensor]:
    """Dense form of `batch_hard_mine` on checked arguments: (positives, negatives), int64 [N].

    Both are -1 for an anchor that lacks either. Distances are float64 direct differences: the exact answer
    for any input dtype.
    """
    x = embeddings.double()
    distances = pairwise(x, x if ref_embeddings is None else ref_embeddings.double(), distance)
    positives, negatives = choose(distances, *pairs_by_label(labels, ref_labels), positive, negative)
    valid = (positives >= 0) & (negatives >= 0) & all_finite(embeddings, ref_embeddings)
    return torch.where(valid, positives, -1), torch.where(valid, negatives, -1)


def indexed_triplet_loss(
    embeddings: Tensor,
    ref_embeddings: Tensor | None,
    positives: Tensor,
    negatives: Tensor,
    *,
    margin: float,
    soft: bool,
    distance: str,
    reduction: str,
) -> Tensor:
    """The loss of `batch_hard_triplet_loss` for given triplets; differentiable to any order.

    Args:
        embeddings: [N, D], the anchors.
        ref_embeddings: [M, D], or None for `embeddings`.
        positives, negatives: integer [N], rows of `ref_embeddings`; both -1 for an anchor that is not valid.
        margin, soft, distance, reduction: as in `batch_hard_triplet_loss`; nothing is checked.
    """
    triplets = _indexed_triplets(
        embeddings, ref_embeddings, positives, negatives, margin=margin, soft=soft, distance=distance
    )
    return nan_unless_finite(reduce(triplets.loss, triplets.counted, reduction), embeddings, ref_embeddings)


def _indexed_triplets(
    embeddings: Tensor,
    ref_embeddings: Tensor | None,
    positives: Tensor,
    negatives: Tensor,
    *,
    margin: float,
    soft: bool,
    distance: str,
) -> Triplets:
    """The triplet of every anchor, [N]; not counted where the anchor is not valid."""
    x = embeddings.to(compute_dtype(embeddings))
    refs = x if ref_embeddings is None else ref_embeddings.to(x.dtype)
    refs = torch.cat([refs, refs.new_zeros(1, refs.shape[1])])  # where index -1 lands, even if M = 0
    d_ap = rowwise(x, refs[positives], distance)
    d_an = rowwise(x, refs[negatives], distance)
    return triplet_terms(d_ap, d_an, positives >= 0, margin, soft)
