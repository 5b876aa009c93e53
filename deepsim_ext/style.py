"""Style loss: the function that people call, and the ops' shapes and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._autograd import differentiable
from .gram import gram_gradient, normalization
from .reference.style import masked

LAYERS_PER_CALL = 16  # that the ops take


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
    options = (*normalization(normalize), reduction, distance)
    by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor, float]]] = {}
    for layer in layers:
        features = masked(layer.features, layer.mask).flatten(start_dim=2)
        by_dtype.setdefault(features.dtype, []).append((features, layer.target, layer.weight))
    losses = []
    for group in by_dtype.values():
        for first in range(0, len(group), LAYERS_PER_CALL):
            columns = zip(*group[first : first + LAYERS_PER_CALL], strict=True)
            losses.append(_style(*map(list, columns), *options)[0])
    return sum(losses[1:], losses[0])


# ---- shapes ------------------------------------------------------------------------------------------------


def _residual_sizes(features: Sequence[Tensor]) -> list[int]:
    return [f.shape[0] * f.shape[1] * f.shape[1] for f in features]


@torch.library.register_fake("deepsim_ext::style_loss")
def _(features, target, weights, normalize, divisor, reduction, distance):
    loss = features[0].new_empty((), dtype=_checks.compute_dtype(features[0]))
    return loss, loss.new_empty(len(features)), loss.new_empty(sum(_residual_sizes(features)))


@torch.library.register_fake("deepsim_ext::style_loss_backward")
def _(grad_loss, losses, residuals, features, wanted, *options):
    return [torch.empty_like(f) if w else f.new_empty(0) for f, w in zip(features, wanted, strict=True)]


# ---- gradients ---------------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, target, *ctx.options = inputs
    _, losses, residuals = output
    ctx.shared = [t.shape[0] == 1 for t in target]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(losses, residuals, *features)


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_losses: Tensor | None, grad_residuals: Tensor | None
) -> tuple[Any, ...]:
    losses, residuals, *features = ctx.saved_tensors
    wanted, wanted_targets, *_ = ctx.needs_input_grad
    others = (None,) * len(ctx.options)
    # One op for all layers where it is only about their features, once.
    if grad_losses is grad_residuals is None and not any(wanted_targets) and not torch.is_grad_enabled():
        if grad_loss is None:
            return [None] * len(features), [None] * len(features), *others
        backward = torch.ops.deepsim_ext.style_loss_backward.default
        grads = backward(grad_loss, losses, residuals, features, list(wanted), *ctx.options)
        grads = [g if w else None for g, w in zip(grads, wanted, strict=True)]
        return grads, [None] * len(features), *others

    # Losses and residuals are outputs that carry gradient, so the double backward needs no formula.
    weights, *normalization, reduction, distance = ctx.options
    gradients, target_gradients = [], []
    pieces = residuals.split(_residual_sizes(features))
    grad_pieces = (
        [None] * len(pieces)
        if grad_residuals is None
        else grad_residuals.split_with_sizes(_residual_sizes(features))
    )
    for i, f in enumerate(features):
        b, c, n = f.shape
        residual = pieces[i].view(b, c, c)
        grad_gram = None if grad_pieces[i] is None else grad_pieces[i].view(b, c, c)
        incoming = None if grad_loss is None else weights[i] * grad_loss
        if grad_losses is not None:
            incoming = grad_losses[i] if incoming is None else incoming + grad_losses[i]
        if incoming is not None:
            factor = {"mean": 1 / (b * c * c), "sum": 1.0, "gatys": 1 / (4 * c * c * n * n)}[reduction]
            through_loss = (factor * incoming) * _slope(residual, losses[i], distance)
            grad_gram = through_loss if grad_gram is None else grad_gram + through_loss
        if grad_gram is None:
            gradients.append(None)
            target_gradients.append(None)
            continue
        gradients.append(gram_gradient(grad_gram, f, *normalization) if wanted[i] else None)
        by_target = grad_gram.sum(dim=0, keepdim=True) if ctx.shared[i] else grad_gram
        target_gradients.append(-by_target if wanted_targets[i] else None)
    return gradients, target_gradients, *others


def _slope(residual: Tensor, loss: Tensor, distance: str) -> Tensor:
    """The derivative of a layer's loss by its residual, without the factor."""
    if distance == "l1":
        return residual.sign()
    if distance == "l2":
        return 2 * residual
    return torch.where(loss == 0, 0.0, residual / loss.masked_fill(loss == 0, 1))


_style = differentiable("style_loss", _backward, _save_for_backward)
