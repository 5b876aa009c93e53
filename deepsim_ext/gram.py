"""Gram matrix and style loss: the functions that people call, and the ops' shapes and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._autograd import differentiable
from .reference.style import masked, root


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
    return _gram(features.flatten(start_dim=2), *_normalization(normalize))


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

    Gram matrix, difference and loss are one pass over the features; the gradient is one matrix product, into
    which scale, weight and incoming gradient are folded before anything is rounded to half.
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
        Scalar; float32, or float64 for float64 input. Differentiable in `features`, `target` and `mask`,
        to any order.

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
    options = (*_normalization(normalize), reduction, "l1" if distance == "l1" else "l2")
    losses = []
    for layer in layers:
        layer_features = masked(layer.features, layer.mask)
        loss = _style(layer_features.flatten(start_dim=2), layer.target, *options)[0]
        losses.append(layer.weight * (root(loss) if distance == "frobenius" else loss))
    return sum(losses[1:], losses[0])


def _normalization(normalize: str | float) -> tuple[str, float]:
    """What the ops divide by, as they take it: the name of a size, times a number."""
    return (normalize, 1.0) if isinstance(normalize, str) else ("none", float(normalize))


# ---- shapes ------------------------------------------------------------------------------------------------


def _empty_gram(features: Tensor) -> Tensor:
    b, c, _ = features.shape
    return features.new_empty((b, c, c), dtype=_checks.compute_dtype(features))


@torch.library.register_fake("deepsim_ext::gram_matrix")
def _(features, normalize, divisor):
    return _empty_gram(features)


@torch.library.register_fake("deepsim_ext::gram_matrix_backward")
def _(grad_gram, features, normalize, divisor):
    return torch.empty_like(features)


@torch.library.register_fake("deepsim_ext::style_loss")
def _(features, target, normalize, divisor, reduction, distance):
    residual = _empty_gram(features)
    return residual.new_empty(()), residual


# ---- gradients ---------------------------------------------------------------------------------------------


def _save_for_gram_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, *ctx.normalization = inputs
    ctx.save_for_backward(features)


def _gram_backward(ctx: Any, grad_gram: Tensor) -> tuple[Any, ...]:
    (features,) = ctx.saved_tensors
    return _gram_gradient(grad_gram, features, *ctx.normalization), None, None


def _save_for_gram_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_gram, features, *ctx.normalization = inputs
    ctx.save_for_backward(grad_gram, features)


def _gram_double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # scale * (dG + dG^T) F is linear in each: the gradient by F is the op again, that by dG a product.
    grad_gram, features = ctx.saved_tensors
    with torch.autocast(features.device.type, enabled=False):  # which would round the factors to half
        product = grad.to(grad_gram.dtype) @ features.to(grad_gram.dtype).mT
    by_grad_gram = (product + product.mT) / _divisor(features, *ctx.normalization)
    return by_grad_gram, _gram_gradient(grad_gram, grad, *ctx.normalization), None, None


def _divisor(features: Tensor, normalize: str, divisor: float) -> float:
    b, c, n = features.shape
    return divisor * {"none": 1, "hw": n, "chw": c * n, "bchw": b * c * n}[normalize]


def _save_for_style_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, target, *ctx.normalization, ctx.reduction, ctx.distance = inputs
    ctx.one_target = target.shape[0] == 1
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, output[1])


def _style_backward(ctx: Any, grad_loss: Tensor | None, grad_residual: Tensor | None) -> tuple[Any, ...]:
    # The residual is an output that carries gradient: so the double backward needs no formula of its own.
    features, residual = ctx.saved_tensors
    grad_gram = grad_residual
    if grad_loss is not None:
        b, c, n = features.shape
        factor = {"mean": 1 / (b * c * c), "sum": 1.0, "gatys": 1 / (4 * c * c * n * n)}[ctx.reduction]
        if ctx.distance == "l2":
            grad_gram = (2 * factor * grad_loss) * residual
        else:
            grad_gram = (factor * grad_loss) * residual.sign()
        grad_gram = grad_gram if grad_residual is None else grad_gram + grad_residual
    if grad_gram is None:
        return (None,) * 6
    grad_features = grad_target = None
    if ctx.needs_input_grad[0]:
        grad_features = _gram_gradient(grad_gram, features, *ctx.normalization)
    if ctx.needs_input_grad[1]:
        grad_target = -(grad_gram.sum(dim=0, keepdim=True) if ctx.one_target else grad_gram)
    return grad_features, grad_target, None, None, None, None


_gram_gradient = differentiable("gram_matrix_backward", _gram_double_backward, _save_for_gram_double_backward)
_gram = differentiable("gram_matrix", _gram_backward, _save_for_gram_backward)
_style = differentiable("style_loss", _style_backward, _save_for_style_backward)
