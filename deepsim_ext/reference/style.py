"""Gram matrices and style loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .. import _checks


def gram_matrix(features: Tensor, *, normalize: str | float = "chw", mask: Tensor | None = None) -> Tensor:
    """Gram matrices of feature maps: `scale * F F^T` per sample, F = features as [C, N], N = spatial size.

    Source: Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks" (2016), eq. 3,
    which is normalize="none".
    With a mask: the guided Gram matrix of Gatys, Ecker, Bethge, Hertzmann, Shechtman, "Controlling Perceptual
    Factors in Neural Style Transfer" (2017), times N: there the squares of a mask sum to 1.

    Args:
        features: [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0; float32, float64, bfloat16
            or float16.
        normalize: what to divide by: "none" (1), "hw" (N), "chw" (C N), "bchw" (B C N), or a positive number.
        mask: None, or which positions count: [*spatial], [1, *spatial] or [B, *spatial], bool or float with
            values >= 0. Features are multiplied by the mask, scaled first so that its squares sum to N in
            every sample: regions of any area compare, and a mask of ones changes nothing. A mask of zeros
            gives a Gram matrix of zeros, with a gradient of zero.

    Returns:
        [B, C, C]; float32, or float64 for float64 input. Half inputs are multiplied in float32.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown or non-positive `normalize`, or features or mask of the wrong shape or device.
    """
    mask = _checks.gram_matrix("gram_matrix", features, normalize=normalize, mask=mask)
    return _gram(masked(features, mask), normalize)


def style_loss(
    features: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    normalize: str | float = "chw",
    reduction: str = "mean",
    distance: str = "l2",
    mask: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Distance between the Gram matrices of `features` and `target`, summed over layers.

    Source: Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks" (2016), eq. 4
    and 5, which are normalize="none", reduction="gatys".

    Args:
        features: [B, C, *spatial] as in `gram_matrix`, or a list or tuple of them, one per layer.
        target: the same number of Gram matrices [C, C], [1, C, C] or [B, C, C], in the dtype that
            `gram_matrix` returns or that of `features`. Under autocast other dtypes go to the widest.
        weights: None (1 each) or one finite number per layer.
        normalize: as in `gram_matrix`.
        reduction: within a layer, "mean" (times 1 / (B C^2)), "sum" (times 1) or "gatys" (times
            1 / (4 C^2 N^2)); sums run over B too.
        distance: "l2" for squared, "l1" for absolute differences, "frobenius" for the root of the sum of
            squares over all samples of a layer (with reduction="sum"; its gradient is 0 at 0).
        mask: as in `gram_matrix`; for several layers a list or tuple of one mask or None per layer.

    Returns:
        Scalar; float32, or float64 for float64 input. Differentiable in `features`, `target` and
        `mask`.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: an unknown name, no layer, or shapes, devices or lengths that do not go together.
    """
    layers = _checks.style(
        "style_loss",
        features,
        target,
        weights=weights,
        normalize=normalize,
        reduction=reduction,
        distance=distance,
        mask=mask,
    )
    total = 0.0
    for layer in layers:
        b, c = layer.features.shape[:2]
        n = layer.features.shape[2:].numel()
        factor = {"mean": 1 / (b * c * c), "sum": 1.0, "gatys": 1 / (4 * c * c * n * n)}[reduction]
        difference = _gram(masked(layer.features, layer.mask), normalize) - layer.target
        distances = difference.abs() if distance == "l1" else difference.square()
        loss = factor * distances.sum()
        total = total + layer.weight * (root(loss) if distance == "frobenius" else loss)
    return total


def masked(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features times mask [B or 1, *spatial], in the dtype of arithmetic; squares of the mask sum to N.

    Source: Gatys, Ecker, Bethge, Hertzmann, Shechtman, "Controlling Perceptual Factors in Neural Style
    Transfer" (2017), where they sum to 1.
    """
    if mask is None:
        return features
    dtype = _checks.compute_dtype(features)
    m = mask.to(dtype).flatten(start_dim=1)
    # Values near the ends of the dtype's range have squares within it; the scale makes up for it.
    peak = m.detach().amax(dim=1, keepdim=True)
    m = m / peak.masked_fill(peak == 0, 1)
    squares = m.square().sum(dim=1, keepdim=True)
    m = m * (m.shape[1] / squares.masked_fill(squares == 0, 1)).sqrt()
    return features * m.reshape(mask.shape)[:, None]  # in the wider dtype of the two, the mask's


def root(x: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0."""
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _gram(features: Tensor, normalize: str | float) -> Tensor:
    f = features.flatten(start_dim=2).to(_checks.compute_dtype(features))
    b, c, n = f.shape
    divisors = {"none": 1, "hw": n, "chw": c * n, "bchw": b * c * n}
    divisor = divisors[normalize] if isinstance(normalize, str) else normalize
    device = f.device.type
    can_autocast = torch.amp.is_autocast_available(device)
    # Autocast would round the factors to half.
    with torch.autocast(device, enabled=False) if can_autocast else nullcontext():
        return (f @ f.mT) / divisor
