"""Contrastive loss of all pairs of a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._checks import compute_dtype
from ..results import ContrastiveResult
from .distances import all_distances
from .finite import nan_unless_finite
from .triplets import pairs_by_label, reduce


def batch_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    squared: bool = False,
    distance: str = "euclidean",
    reduction: str = "mean_nonzero",
    return_stats: bool = False,
) -> Tensor | ContrastiveResult:
    """Contrastive loss of every ordered pair of rows.

    `relu(d - pos_margin)` of a positive pair, whose rows have one label, and `relu(neg_margin - d)` of a
    negative pair, whose rows have two; both squared when `squared`. Source: Hadsell, Chopra, LeCun,
    "Dimensionality Reduction by Learning an Invariant Mapping" (2006), eq. 4, which is squared=True without
    its factor 1/2; the defaults are those of pytorch-metric-learning's ContrastiveLoss.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, distance: as in `batch_all_triplet_loss`. A pair is a
            row of `embeddings` and one of `ref_embeddings`, or two different rows of `embeddings`.
        pos_margin, neg_margin: finite, >= 0, in units of the distance. Positive pairs nearer than the one and
            negative pairs farther than the other cost nothing.
        squared: square what each pair costs.
        reduction: "mean_nonzero", the mean over positive pairs whose loss is > 0 plus the mean over negative
            pairs whose loss is > 0; "mean" over all pairs, positive and negative; or "sum". The mean of
            nothing is 0.
        return_stats: return a `ContrastiveResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar; float32, or float64 for float64 input. Half inputs are computed in float32.
        Gradients flow into both embeddings; that of a Euclidean distance is 0 at 0, and that of a cosine
        distance is 0 at a zero vector. A NaN or inf in an embedding makes the loss NaN.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance or reduction, a negative or non-finite margin, or shapes or devices that
            do not go together.
    """
    function = "batch_contrastive_loss"
    pos_margin, neg_margin = _checks.batch_contrastive_options(
        function,
        pos_margin=pos_margin,
        neg_margin=neg_margin,
        squared=squared,
        distance=distance,
        reduction=reduction,
        return_stats=return_stats,
    )
    arguments = _checks.batch_hard(
        function, embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    loss = dense_contrastive(*arguments, pos_margin, neg_margin, squared, distance, reduction)
    if not return_stats:
        return loss
    return _statistics(loss, *arguments, pos_margin, neg_margin, squared, distance)


def dense_contrastive(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    pos_margin: float,
    neg_margin: float,
    squared: bool,
    distance: str,
    reduction: str,
) -> Tensor:
    """The loss of `batch_contrastive_loss` on checked arguments; differentiable to any order.

    It builds an [N, M, D] tensor.
    """
    pairs = _pairs(embeddings, labels, ref_embeddings, ref_labels, pos_margin, neg_margin, squared, distance)
    if reduction == "mean_nonzero":
        loss = reduce(pairs.positive_loss, pairs.positive, reduction)
        loss = loss + reduce(pairs.negative_loss, pairs.negative, reduction)
    else:
        loss = reduce(pairs.positive_loss + pairs.negative_loss, pairs.positive | pairs.negative, reduction)
    return nan_unless_finite(loss, embeddings, ref_embeddings)


class _Pairs(NamedTuple):
    """All pairs, [N, M]; a row is no pair with itself."""

    d: Tensor
    positive: Tensor  # bool
    negative: Tensor  # bool
    positive_loss: Tensor  # 0 where not positive
    negative_loss: Tensor  # 0 where not negative


def _pairs(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    pos_margin: float,
    neg_margin: float,
    squared: bool,
    distance: str,
) -> _Pairs:
    d = all_distances(embeddings, ref_embeddings, compute_dtype(embeddings), distance)
    positive, negative = pairs_by_label(labels, ref_labels)
    positive_loss = torch.where(positive, (d - pos_margin).relu(), 0)
    negative_loss = torch.where(negative, (neg_margin - d).relu(), 0)
    if squared:
        positive_loss, negative_loss = positive_loss.square(), negative_loss.square()
    return _Pairs(d, positive, negative, positive_loss, negative_loss)


@torch.no_grad()
def _statistics(
    loss: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    pos_margin: float,
    neg_margin: float,
    squared: bool,
    distance: str,
) -> ContrastiveResult:
    pairs = _pairs(embeddings, labels, ref_embeddings, ref_labels, pos_margin, neg_margin, squared, distance)

    def mean_distance(counted: Tensor) -> Tensor:
        mean = reduce(torch.where(counted, pairs.d, 0), counted, "mean")
        return nan_unless_finite(mean, embeddings, ref_embeddings)

    return ContrastiveResult(
        loss=loss,
        positive_pairs=pairs.positive.sum(),
        negative_pairs=pairs.negative.sum(),
        active_positive_pairs=(pairs.positive_loss > 0).sum(),
        active_negative_pairs=(pairs.negative_loss > 0).sum(),
        mean_d_positive=mean_distance(pairs.positive),
        mean_d_negative=mean_distance(pairs.negative),
    )
