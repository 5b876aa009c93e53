"""Contrastive loss of given pairs."""

from __future__ import annotations

from torch import Tensor

from . import _checks, reference
from ._given_rows import given_rows_loss


def contrastive_loss(
    x1: Tensor, x2: Tensor, y: Tensor, *, margin: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Contrastive loss `y d^2 + (1 - y) relu(margin - d)^2` with `d = ||x1 - x2||`, per pair.

    Source: Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping" (2006), eq. 4,
    without its factor 1/2 and with y = 1 for a similar pair.

    Args:
        x1, x2: [N, D] embeddings with D >= 1; float32, float64, bfloat16 or float16. Under autocast their
            dtypes may differ and go to the widest.
        y: [N], 1 where the pair belongs together and 0 where not; bool, integer or float, without gradient.
            Beyond [0, 1], as are labels of 1 and -1, the loss is NaN.
        margin: finite, >= 0, in units of d; dissimilar pairs farther apart cost nothing.
        reduction: "mean" over pairs (0 for N = 0), "sum" or "none".

    Returns:
        Scalar, or [N] for "none"; float32, or float64 for float64 input. Half inputs are compared in float32.
        Differentiable to any order; the gradient of d at d = 0 is 0. A NaN or inf in a pair makes its loss
        and gradients NaN, and so do float64 rows too far apart for their squares (1e154).

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown reduction, negative or non-finite margin, shapes or devices that do not go
            together, or a `y` that requires grad.
    """
    x1, x2, y, margin = _checks.contrastive("contrastive_loss", x1, x2, y, margin=margin, reduction=reduction)
    return _loss(x1, x2, y, margin, reduction)


def _dense_loss(x1: Tensor, x2: Tensor, y: Tensor, margin: float, reduction: str) -> Tensor:
    return reference.contrastive_loss(x1, x2, y, margin=margin, reduction=reduction)


_loss = given_rows_loss("contrastive_loss", 2, lambda *_: 1, _dense_loss)
