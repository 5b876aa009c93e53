"""Total variation."""

from __future__ import annotations

from torch import Tensor

from .. import _checks


def total_variation_loss(image: Tensor, *, distance: str = "l2", reduction: str = "mean") -> Tensor:
    """Differences of neighbours along each spatial dimension, summed over dimensions.

    Arguments, result and errors are those of `deepsim_ext.functional.total_variation_loss`.
    """
    _checks.total_variation("total_variation_loss", image, distance=distance, reduction=reduction)
    total = 0.0
    for dim in range(2, image.ndim):
        difference = image.to(_checks.compute_dtype(image)).diff(dim=dim)
        distances = difference.abs() if distance == "l1" else difference.square()
        total = total + distances.sum() / (max(distances.numel(), 1) if reduction == "mean" else 1)
    return total
