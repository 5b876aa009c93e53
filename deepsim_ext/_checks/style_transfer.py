"""StyleTransferLoss: names of layers, targets, and the features that meet them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .layers import (
    LAYER_REDUCTIONS,
    MASK_DTYPES,
    VARIATION_DISTANCES,
    VARIATION_REDUCTIONS,
    check_features,
    layer_weights,
    style_options,
)
from .options import choice, is_number, margin_value
from .tensors import FLOAT_NAMES, check_device, is_dense, tensor_error
from .texts import describe, error


class StylePicture(NamedTuple):
    features: Mapping[str, Tensor]  # [B or 1, C, *spatial] per layer
    blend_weight: float
    mask: Tensor | None  # [B or 1, *spatial], at any resolution


def style_transfer_options(
    function: str,
    *,
    style_layers: list[str] | tuple[str, ...],
    content_layers: list[str] | tuple[str, ...],
    style_weight: float,
    content_weight: float,
    tv_weight: float,
    style_layer_weights: list[float] | tuple[float, ...] | None,
    content_layer_weights: list[float] | tuple[float, ...] | None,
    normalize: str | float,
    reduction: str,
    distance: str,
    content_reduction: str,
    tv_distance: str,
    tv_reduction: str,
) -> None:
    """All options of StyleTransferLoss."""
    for kind, layers, weights in (
        ("style", style_layers, style_layer_weights),
        ("content", content_layers, content_layer_weights),
    ):
        _layer_names(function, f"{kind}_layers", layers)
        layer_weights(function, weights, f"{kind}_layer_weights")
        if weights is not None and len(weights) != len(layers):
            expected = f"one number per layer of {kind}_layers ({len(layers)})"
            raise error(ValueError, function, f"{kind}_layer_weights", expected, str(len(weights)))
    for name, value in (
        ("style_weight", style_weight),
        ("content_weight", content_weight),
        ("tv_weight", tv_weight),
    ):
        margin_value(function, name, value)
    if not (style_layers and style_weight or content_layers and content_weight or tv_weight):
        expected = "at least one with a weight > 0 and a layer"
        raise error(ValueError, function, "the terms", expected, "none")
    style_options(function, weights=None, normalize=normalize, reduction=reduction, distance=distance)
    choice(function, "content_reduction", content_reduction, LAYER_REDUCTIONS)
    choice(function, "tv_distance", tv_distance, VARIATION_DISTANCES)
    choice(function, "tv_reduction", tv_reduction, VARIATION_REDUCTIONS)


def style_pictures(
    function: str, features: Any, layers: tuple[str, ...], *, blend_weights: Any, style_masks: Any
) -> list[StylePicture]:
    """The pictures of one style; their blend weights sum to 1."""
    if isinstance(features, Mapping):
        pictures, masks = [("features", features)], [("style_masks", style_masks)]
    else:
        if not isinstance(features, list | tuple):
            expected = "a mapping from layer names to tensors, or a list or tuple of them"
            raise error(TypeError, function, "features", expected, describe(features))
        count = len(features)
        if count == 0:
            raise error(ValueError, function, "features", "at least one picture", "an empty sequence")
        if style_masks is None:
            style_masks = [None] * count
        if not isinstance(style_masks, list | tuple):
            expected = f"None or a list or tuple of {count} tensors or None, as features is"
            raise error(TypeError, function, "style_masks", expected, describe(style_masks))
        if len(style_masks) != count:
            expected = f"one tensor or None per picture of features ({count})"
            raise error(ValueError, function, "style_masks", expected, str(len(style_masks)))
        pictures = [(f"features[{i}]", picture) for i, picture in enumerate(features)]
        masks = [(f"style_masks[{i}]", mask) for i, mask in enumerate(style_masks)]
    weights = _blend(function, blend_weights, len(pictures))
    checked: list[StylePicture] = []
    samples = 1
    for (name, picture), (mask_name, mask), weight in zip(pictures, masks, weights, strict=True):
        batch = layer_tensors(function, name, picture, layers)
        if mask is not None:
            first = picture[layers[0]]
            mask = picture_mask(function, mask_name, mask, f'{name}["{layers[0]}"]', first, batch)
        for layer in layers if checked else ():
            layer_name, first_name = f'{name}["{layer}"]', f'features[0]["{layer}"]'
            x, first = picture[layer], checked[0].features[layer]
            if x.shape[1] != first.shape[1]:
                expected = f"of {first.shape[1]} channels, as {first_name} is"
                raise error(ValueError, function, layer_name, expected, describe(x))
            if batch not in (1, samples) and samples > 1:
                expected = f"of 1 or {samples} samples, as pictures before it are"
                raise error(ValueError, function, layer_name, expected, describe(x))
            check_device(function, layer_name, x, first_name, first)
        checked.append(StylePicture(picture, weight, mask))
        samples = max(samples, batch)
    return checked


def layer_tensors(function: str, argument: str, features: Any, layers: tuple[str, ...]) -> int:
    """A mapping that has all `layers`, of one batch, number of dimensions and device; returns B."""
    if not isinstance(features, Mapping):
        expected = "a mapping from layer names to tensors"
        raise error(TypeError, function, argument, expected, describe(features))
    first = None
    for layer in layers:
        if layer not in features:
            got = ", ".join(f'"{name}"' for name in features) or "an empty mapping"
            raise error(ValueError, function, argument, f'a mapping with the layer "{layer}"', got)
        name, x = f'{argument}["{layer}"]', features[layer]
        check_features(function, name, x)
        first = x if first is None else first
        first_name = f'{argument}["{layers[0]}"]'
        if x.shape[0] != first.shape[0] or x.ndim != first.ndim:
            expected = (
                f"of B={first.shape[0]} samples and {first.ndim - 2} spatial dimensions, as {first_name} is"
            )
            raise error(ValueError, function, name, expected, describe(x))
        check_device(function, name, x, first_name, first)
    return 1 if first is None else first.shape[0]


def picture_mask(
    function: str, argument: str, mask: Any, features_argument: str, features: Tensor, batch: int | None
) -> Tensor:
    """A mask at the resolution of a picture, as [B or 1, *spatial]; without `batch` B is any number."""
    dims = features.ndim - 2
    of_batch = "" if batch is None else f"B={batch}, "
    expected = (
        f"{FLOAT_NAMES} or bool of shape [*spatial], [1, *spatial] or [B, *spatial]"
        f" with {of_batch}{dims} spatial dimensions, none of size 0"
    )
    if (
        not is_dense(mask, MASK_DTYPES)
        or mask.ndim not in (dims, dims + 1)
        or mask.numel() == 0
        or (mask.ndim > dims and batch is not None and mask.shape[0] not in (1, batch))
    ):
        raise tensor_error(function, argument, expected, mask, MASK_DTYPES)
    check_device(function, argument, mask, features_argument, features)
    return mask if mask.ndim > dims else mask[None]


def meets_style(
    function: str, layer: str, features: Tensor, gram: Tensor, mask: Tensor | None, region: int
) -> None:
    """Features of a layer fit a style's Gram matrix [B or 1, C, C], and the mask of its region."""
    b, c = features.shape[:2]
    name = f'features["{layer}"]'
    if c != gram.shape[1]:
        expected = f"of {gram.shape[1]} channels, as those of the style were"
        raise error(ValueError, function, name, expected, describe(features))
    if gram.shape[0] not in (1, b):
        expected = f"of B={gram.shape[0]} samples, as many styles as there are"
        raise error(ValueError, function, name, expected, describe(features))
    if mask is not None and (mask.ndim != features.ndim - 1 or mask.shape[0] not in (1, b)):
        expected = f"of shape [1 or B, *spatial] to match {name} {list(features.shape)}"
        raise error(ValueError, function, f"mask of region {region}", expected, describe(mask))
    check_device(function, name, features, "the style", gram)


def meets_content(function: str, layer: str, features: Tensor, target: Tensor) -> None:
    """Features of a layer fit the content's [B or 1, C, *spatial]."""
    name = f'features["{layer}"]'
    if features.shape[1:] != target.shape[1:] or target.shape[0] not in (1, features.shape[0]):
        expected = f"of the shape of the content {list(target.shape)}"
        raise error(ValueError, function, name, expected, describe(features))
    check_device(function, name, features, "the content", target)


def _layer_names(function: str, argument: str, value: Any) -> None:
    expected = "a list or tuple of layer names, each once"
    if not isinstance(value, list | tuple):
        raise error(TypeError, function, argument, expected, describe(value))
    for name in value:
        if not isinstance(name, str):
            raise error(TypeError, function, argument, expected, f"{describe(name)} among them")
    for name in value:
        if value.count(name) > 1:
            raise error(ValueError, function, argument, expected, f'"{name}" twice')


def _blend(function: str, weights: Any, count: int) -> list[float]:
    """Numbers >= 0, one per picture, made to sum to 1."""
    if weights is None:
        return [1 / count] * count
    if not isinstance(weights, list | tuple) or not all(is_number(w) for w in weights):
        expected = "None or a list or tuple of numbers"
        raise error(TypeError, function, "blend_weights", expected, describe(weights))
    if len(weights) != count:
        expected = f"one number per picture of features ({count})"
        raise error(ValueError, function, "blend_weights", expected, str(len(weights)))
    numbers = [margin_value(function, f"blend_weights[{i}]", w) for i, w in enumerate(weights)]
    if not sum(numbers):
        raise error(ValueError, function, "blend_weights", "of a sum > 0", "a sum of 0")
    return [w / sum(numbers) for w in numbers]
