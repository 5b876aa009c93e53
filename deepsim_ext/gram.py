"""Gram matrix: the function that people call, and the ops' shapes and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._autograd import differentiable
from .reference.style import masked


def gram_matrix(features: Tensor, *, normalize: str | float = "chw", mask: Tensor | None = None) -> Tensor:
    """Gram matrices of feature maps: `scale * F F^T` per sample, F = features as [C, N], N = spatial size.

    Half the products: G is symmetric. Its gradient is one product, `scale * (dG + dG^T) F`.
    Source: Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks" (2016), eq. 3,
    which is normalize="none".
    With a mask: the guided Gram matrix of Gatys, Ecker, Bethge, Hertzmann, Shechtman, "Controlling Perceptual
    Factors in Neural Style Transfer" (2017), times N: there the squares of a mask sum to 1.

    Args:
        features: [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0; float32, float64, bfloat16
            or float16. Contiguous and channels_last are read in place.
        normalize: what to divide by: "none" (1), "hw" (N), "chw" (C N), "bchw" (B C N), or a positive number.
        mask: None, or which positions count: [*spatial], [1, *spatial] or [B, *spatial], bool or float with
            values >= 0. Features are multiplied by the mask, scaled first so that its squares sum to N in
            every sample: regions of any area compare, and a mask of ones changes nothing. A mask of zeros
            gives a Gram matrix of zeros, with a gradient of zero.

    Returns:
        [B, C, C]; float32, or float64 for float64 input. Half inputs are multiplied and summed in float32.
        Differentiable in `features` and `mask`, to any order; gradients come in their dtypes.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown or non-positive `normalize`, or features or mask of the wrong shape or device.
    """
    mask = _checks.gram_matrix("gram_matrix", features, normalize=normalize, mask=mask)
    features = masked(features, mask)
    return _gram(features.flatten(start_dim=2), *normalization(normalize))


def normalization(normalize: str | float) -> tuple[str, float]:
    """What the ops divide by, as they take it: the name of a size, times a number."""
    return (normalize, 1.0) if isinstance(normalize, str) else ("none", float(normalize))


# ---- shapes ------------------------------------------------------------------------------------------------


@torch.library.register_fake("deepsim_ext::gram_matrix")
def _(features, normalize, divisor):
    b, c, _ = features.shape
    return features.new_empty((b, c, c), dtype=_checks.compute_dtype(features))


@torch.library.register_fake("deepsim_ext::gram_matrix_backward")
def _(grad_gram, features, normalize, divisor):
    return torch.empty_like(features)


# ---- gradients ---------------------------------------------------------------------------------------------


def _save_for_gram_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, *ctx.normalization = inputs
    ctx.save_for_backward(features)


def _gram_backward(ctx: Any, grad_gram: Tensor) -> tuple[Any, ...]:
    (features,) = ctx.saved_tensors
    return gram_gradient(grad_gram, features, *ctx.normalization), None, None


def _save_for_gram_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_gram, features, *ctx.normalization = inputs
    ctx.save_for_backward(grad_gram, features)


def _gram_double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # scale * (dG + dG^T) F is linear in each: the gradient by F is the op again, that by dG a product.
    grad_gram, features = ctx.saved_tensors
    with torch.autocast(features.device.type, enabled=False):  # which would round the factors to half
        product = grad.to(grad_gram.dtype) @ features.to(grad_gram.dtype).mT
    by_grad_gram = (product + product.mT) / _divisor(features, *ctx.normalization)
    return by_grad_gram, gram_gradient(grad_gram, grad, *ctx.normalization), None, None


def _divisor(features: Tensor, normalize: str, divisor: float) -> float:
    b, c, n = features.shape
    return divisor * {"none": 1, "hw": n, "chw": c * n, "bchw": b * c * n}[normalize]


gram_gradient = differentiable("gram_matrix_backward", _gram_double_backward, _save_for_gram_double_backward)
_gram = differentiable("gram_matrix", _gram_backward, _save_for_gram_backward)
