"""Content loss: elementwise, so plain torch is all it takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks


def content_loss(
    features: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Squared difference of activations: `factor * sum (features - target)^2`, summed over layers.

    Source: Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks" (2016), eq. 1,
    which is reduction="gatys".

    Args:
        features: a tensor of any shape with at least one element, or a list or tuple of them, one per layer;
            float32, float64, bfloat16 or float16.
        target: the same number of tensors, of the shapes, dtypes and device of `features`. Under autocast the
            dtypes of a layer may differ and go to the widest.
        weights: None (1 each) or one finite number per layer.
        reduction: within a layer, "mean" over all elements (factor = 1 / elements), "sum" (factor = 1) or
            "gatys" (factor = 1/2).

    Returns:
        Scalar in float32, or float64 for float64 input; half inputs are compared in float32. Differentiable
        in `features` and `target`, to any order.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown reduction, no layer, an empty tensor, or shapes, devices or lengths that differ.
    """
    layers = _checks.content("content_loss", features, target, weights=weights, reduction=reduction)
    losses = []
    for layer in layers:
        dtype = _checks.compute_dtype(layer.features)
        f, t = layer.features.to(dtype), layer.target.to(dtype)
        losses.append(layer.factor * torch.nn.functional.mse_loss(f, t, reduction="sum"))
    return sum(losses[1:], losses[0])
