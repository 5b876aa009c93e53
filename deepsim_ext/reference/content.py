"""Content loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _checks


def content_loss(
    features: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Squared difference of activations, summed over layers.

    Arguments, result and errors are those of `deepsim_ext.functional.content_loss`.
    """
    total = 0.0
    for layer in _checks.content("content_loss", features, target, weights=weights, reduction=reduction):
        dtype = _checks.compute_dtype(layer.features)
        difference = layer.features.to(dtype) - layer.target.to(dtype)
        total = total + layer.factor * (difference**2).sum()
    return total
