"""Contrastive loss over all pairs of a batch."""

from __future__ import annotations

from torch import Tensor

from . import _checks, reference
from ._loss_with_gradient import loss_with_gradient
from .results import ContrastiveResult


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
    """Contrastive loss of all ordered pairs: `relu(d - pos_margin)`, or `relu(neg_margin - d)` of two labels.

    Source: Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping" (2006), eq. 4,
    with both terms `squared` and without its factor 1/2; not squared it is the form of
    pytorch-metric-learning.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, distance: as in `batch_hard_mine`.
        pos_margin, neg_margin: finite, >= 0, in units of the distance.
        squared: square both terms.
        reduction: "mean_nonzero" for the mean of the positives with a loss > 0 plus that of the negatives
            with a loss > 0, "mean" over all pairs together, or "sum". The mean of nothing is 0.
        return_stats: return a `ContrastiveResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar; float32, or float64 for float64 input. Half inputs are computed in float32, their gradients
        come in the input's dtype. Gradients flow into both embeddings (the second derivative is computed in
        plain torch, with an [N, N, D] tensor); that of a Euclidean distance is 0 at 0, and that of a cosine
        distance is 0 at a zero vector. A NaN or inf in an embedding makes the loss NaN, and so do rows too
        long for their squares (1e18 in float32).

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
    loss, counts, means = _all_pairs(*arguments, pos_margin, neg_margin, squared, distance, reduction)
    return ContrastiveResult(loss, *counts.unbind(), *means.unbind()) if return_stats else loss


_all_pairs = loss_with_gradient("batch_contrastive_loss", 4, reference.dense_contrastive)
