"""Style transfer: features and targets, per layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import choice, is_number, to_float
from .tensors import (
    FLOAT_DTYPES,
    FLOAT_NAMES,
    check_device,
    compute_dtype,
    is_dense,
    match_dtypes,
    tensor_error,
)
from .texts import describe, error, one_of

LAYER_REDUCTIONS = ("mean", "sum", "gatys")
GRAM_NORMALIZATIONS = ("none", "hw", "chw", "bchw")
GRAM_DISTANCES = ("l2", "l1", "frobenius")
VARIATION_DISTANCES = ("l2", "l1")
VARIATION_REDUCTIONS = ("mean", "sum")
MASK_DTYPES = (*FLOAT_DTYPES, torch.bool)


class StyleLayer(NamedTuple):
    features: Tensor  # [B, C, *spatial]
    target: Tensor  # [B or 1, C, C], in compute_dtype(features)
    weight: float
    mask: Tensor | None  # [B or 1, *spatial], any of MASK_DTYPES


class ContentLayer(NamedTuple):
    features: Tensor
    target: Tensor  # shape and dtype of features
    factor: float  # loss = factor * sum (features - target)^2: reduction and layer weight in one


def gram_matrix(
    function: str, features: Tensor, *, normalize: str | float, mask: Tensor | None
) -> Tensor | None:
    """All arguments of gram_matrix; returns the mask as [B or 1, *spatial]."""
    gram_normalization(function, normalize)
    check_features(function, "features", features)
    return _mask(function, "mask", mask, "features", features)


def style(
    function: str,
    features: Tensor | list[Tensor] | tuple[Tensor, ...],
    target: Tensor | list[Tensor] | tuple[Tensor, ...],
    *,
    weights: list[float] | tuple[float, ...] | None,
    normalize: str | float,
    reduction: str,
    distance: str,
    mask: Tensor | list[Tensor | None] | tuple[Tensor | None, ...] | None,
) -> list[StyleLayer]:
    """All arguments of style_loss, as a list of layers."""
    style_options(function, weights=weights, normalize=normalize, reduction=reduction, distance=distance)
    layers = []
    named = _layers(function, features, target, weights)
    masks = _layer_masks(function, features, mask)
    for (f_name, f, t_name, t, weight), (m_name, m) in zip(named, masks, strict=True):
        check_features(function, f_name, f)
        check_device(function, f_name, f, "features[0]", layers[0].features if layers else f)
        m = _mask(function, m_name, m, f_name, f)
        f, t = _gram_target(function, t_name, t, f_name, f)
        layers.append(StyleLayer(f, t, weight, m))
    return layers


def style_options(
    function: str,
    *,
    weights: list[float] | tuple[float, ...] | None,
    normalize: str | float,
    reduction: str,
    distance: str,
) -> None:
    """All options of style_loss."""
    layer_weights(function, weights)
    gram_normalization(function, normalize)
    choice(function, "reduction", reduction, LAYER_REDUCTIONS)
    choice(function, "distance", distance, GRAM_DISTANCES)
    if distance == "frobenius" and reduction != "sum":
        expected = '"sum" where distance="frobenius"'
        raise error(ValueError, function, "reduction", expected, describe(reduction))


def content(
    function: str,
    features: Tensor | list[Tensor] | tuple[Tensor, ...],
    target: Tensor | list[Tensor] | tuple[Tensor, ...],
    *,
    weights: list[float] | tuple[float, ...] | None,
    reduction: str,
) -> list[ContentLayer]:
    """All arguments of content_loss, as a list of layers."""
    content_options(function, weights=weights, reduction=reduction)
    layers = []
    for f_name, f, t_name, t, weight in _layers(function, features, target, weights):
        if not is_dense(f, FLOAT_DTYPES) or f.numel() == 0:
            expected = f"{FLOAT_NAMES} with at least one element"
            raise tensor_error(function, f_name, expected, f, FLOAT_DTYPES)
        if not is_dense(t, FLOAT_DTYPES) or t.shape != f.shape:
            expected = f"{FLOAT_NAMES} of the shape of {f_name} {list(f.shape)}"
            raise tensor_error(function, t_name, expected, t, FLOAT_DTYPES)
        check_device(function, f_name, f, "features[0]", layers[0].features if layers else f)
        check_device(function, t_name, t, f_name, f)
        f, t = match_dtypes(function, f_name, f, t_name, t, (f.dtype,))
        factor = {"mean": 1.0 / f.numel(), "sum": 1.0, "gatys": 0.5}[reduction]
        layers.append(ContentLayer(f, t, weight * factor))
    return layers


def content_options(
    function: str, *, weights: list[float] | tuple[float, ...] | None, reduction: str
) -> None:
    """All options of content_loss."""
    layer_weights(function, weights)
    choice(function, "reduction", reduction, LAYER_REDUCTIONS)


def total_variation(function: str, image: Tensor, *, distance: str, reduction: str) -> None:
    """All arguments of total_variation_loss."""
    total_variation_options(function, distance=distance, reduction=reduction)
    check_features(function, "image", image)


def total_variation_options(function: str, *, distance: str, reduction: str) -> None:
    """All options of total_variation_loss."""
    choice(function, "distance", distance, VARIATION_DISTANCES)
    choice(function, "reduction", reduction, VARIATION_REDUCTIONS)


def gram_normalization(function: str, value: str | float) -> None:
    """A name out of GRAM_NORMALIZATIONS or a positive finite number."""
    expected = f"{one_of(GRAM_NORMALIZATIONS)} or a finite number > 0"
    if isinstance(value, str):
        valid = value in GRAM_NORMALIZATIONS
    elif is_number(value):
        valid = 0 < to_float(value) < math.inf
    else:
        raise error(TypeError, function, "normalize", expected, describe(value))
    if not valid:
        raise error(ValueError, function, "normalize", expected, describe(value))


def layer_weights(
    function: str, value: list[float] | tuple[float, ...] | None, argument: str = "weights"
) -> None:
    """None, or finite numbers, one per layer; `style` and `content` check how many."""
    if value is None:
        return
    if not isinstance(value, list | tuple):
        expected = "None or a list or tuple of finite numbers"
        raise error(TypeError, function, argument, expected, describe(value))
    for i, weight in enumerate(value):
        if not is_number(weight):
            raise error(TypeError, function, f"{argument}[{i}]", "a finite number", describe(weight))
        if not -math.inf < to_float(weight) < math.inf:
            raise error(ValueError, function, f"{argument}[{i}]", "a finite number", describe(weight))


def check_features(function: str, argument: str, x: Any) -> None:
    """Features of a layer, or an image."""
    if not is_dense(x, FLOAT_DTYPES) or not 3 <= x.ndim <= 5 or x.numel() == 0:
        expected = f"{FLOAT_NAMES} of shape [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0"
        raise tensor_error(function, argument, expected, x, FLOAT_DTYPES)


def _gram_target(
    function: str, argument: str, target: Any, features_argument: str, features: Tensor
) -> tuple[Tensor, Tensor]:
    """The features, and the target as [B or 1, C, C] in the dtype of their Gram matrix."""
    b, c = features.shape[:2]
    if (
        not is_dense(target, FLOAT_DTYPES)
        or target.ndim not in (2, 3)
        or (target.ndim == 3 and target.shape[0] not in (1, b))
        or target.shape[-2] != c
        or target.shape[-1] != c
    ):
        expected = f"{FLOAT_NAMES} of shape [C, C], [1, C, C] or [B, C, C] with B={b}, C={c}"
        raise tensor_error(function, argument, expected, target, FLOAT_DTYPES)
    check_device(function, argument, target, features_argument, features)
    dtypes = (compute_dtype(features), features.dtype)  # the Gram matrix's own, or half as half features are
    features, target = match_dtypes(function, features_argument, features, argument, target, dtypes)
    target = target.to(compute_dtype(features))
    return features, target if target.ndim == 3 else target[None]


def _mask(function: str, argument: str, mask: Any, features_argument: str, features: Tensor) -> Tensor | None:
    """The mask as [B or 1, *spatial]."""
    if mask is None:
        return None
    b, _, *spatial = features.shape
    if not is_dense(mask, MASK_DTYPES) or list(mask.shape) not in (spatial, [1, *spatial], [b, *spatial]):
        expected = (
            f"{FLOAT_NAMES} or bool of shape [*spatial], [1, *spatial] or [B, *spatial]"
            f" with B={b}, spatial={spatial}"
        )
        raise tensor_error(function, argument, expected, mask, MASK_DTYPES)
    check_device(function, argument, mask, features_argument, features)
    return mask if mask.ndim == features.ndim - 1 else mask[None]


def _layer_masks(function: str, features: Any, mask: Any) -> list[tuple[str, Any]]:
    """(name, mask) per layer, for features that `_layers` has seen."""
    if isinstance(features, Tensor):
        return [("mask", mask)]
    count = len(features)
    if mask is None:
        return [("mask", None)] * count
    if not isinstance(mask, list | tuple):
        expected = f"None or a list or tuple of {count} tensors or None, as features is"
        raise error(TypeError, function, "mask", expected, describe(mask))
    if len(mask) != count:
        expected = f"one tensor or None per layer of features ({count})"
        raise error(ValueError, function, "mask", expected, str(len(mask)))
    return [(f"mask[{i}]", m) for i, m in enumerate(mask)]


def _layers(
    function: str, features: Any, target: Any, weights: list[float] | tuple[float, ...] | None
) -> list[tuple[str, Any, str, Any, float]]:
    """(name of features, features, name of target, target, weight) per layer; a bare tensor is one layer."""
    if isinstance(features, Tensor):
        if not isinstance(target, Tensor):
            raise error(TypeError, function, "target", "a tensor, as features is", describe(target))
        names, features, target = [("features", "target")], [features], [target]
    else:
        if not isinstance(features, list | tuple):
            expected = "a tensor or a list or tuple of tensors"
            raise error(TypeError, function, "features", expected, describe(features))
        count = len(features)
        if count == 0:
            raise error(ValueError, function, "features", "at least one layer", "an empty sequence")
        if not isinstance(target, list | tuple):
            expected = f"a list or tuple of {count} tensors, as features is"
            raise error(TypeError, function, "target", expected, describe(target))
        if len(target) != count:
            expected = f"one tensor per layer of features ({count})"
            raise error(ValueError, function, "target", expected, str(len(target)))
        names = [(f"features[{i}]", f"target[{i}]") for i in range(count)]
    if weights is None:
        weights = [1.0] * len(features)
    if len(weights) != len(features):
        expected = f"one number per layer of features ({len(features)})"
        raise error(ValueError, function, "weights", expected, str(len(weights)))
    return [
        (f_name, f, t_name, t, float(weight))
        for (f_name, t_name), f, t, weight in zip(names, features, target, weights, strict=True)
    ]
