"""Total variation: elementwise, so plain torch is all it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks


def total_variation_loss(image: Tensor, *, distance: str = "l2", reduction: str = "mean") -> Tensor:
    """Differences of neighbours along each spatial dimension, summed over dimensions: how rough an image is.

    Source: Mahendran, Vedaldi, "Understanding Deep Image Representations by Inverting Them" (2015),
    with beta = 2, which is distance="l2", reduction="sum". "l1" is the anisotropic total variation.

    Args:
        image: [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0; float32, float64, bfloat16 or
            float16. A size of 1 has no neighbours and adds nothing.
        distance: "l2" for squared, "l1" for absolute differences.
        reduction: along a dimension, "mean" over all its differences, those of B and C too, or "sum".

    Returns:
        Scalar in float32, or float64 for float64 input; half inputs are compared in float32. Differentiable
        to any order; the gradient of an absolute difference of 0 is 0.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: an unknown name, or an image of the wrong shape.
    """
    _checks.total_variation("total_variation_loss", image, distance=distance, reduction=reduction)
    x = image.to(_checks.compute_dtype(image))
    distances = {"l2": torch.nn.functional.mse_loss, "l1": torch.nn.functional.l1_loss}[distance]
    total = 0.0
    for dim in range(2, x.ndim):
        size = x.shape[dim]
        after, before = x.narrow(dim, 1, size - 1), x.narrow(dim, 0, size - 1)
        loss = distances(after, before, reduction="sum")
        if reduction == "mean" and size > 1:
            loss = loss / after.numel()
        total = total + loss
    return total
