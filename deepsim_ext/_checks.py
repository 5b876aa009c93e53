"""Argument checks shared by the compiled functions and the reference, so that both raise the same errors.

One call per public function checks everything and returns the arguments in the form that implementations work
on. Every error reads `function: argument must be <expected>, got <what>`: TypeError for a wrong Python type,
tensor layout or dtype, ValueError for a wrong value, shape or device. Checks look at types, dtypes, shapes
and devices, never at a tensor's values, and put sizes into texts only when they raise: they cost no device
sync and trace under torch.compile(fullgraph=True) with dynamic shapes, under vmap and with fake tensors.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

DISTANCES = ("euclidean", "sqeuclidean", "cosine")
TRIPLET_REDUCTIONS = ("mean", "mean_nonzero", "sum", "none")
PAIR_REDUCTIONS = ("mean", "sum", "none")
LAYER_REDUCTIONS = ("mean", "sum", "gatys")
GRAM_NORMALIZATIONS = ("none", "hw", "chw", "bchw")
GRAM_DISTANCES = ("l2", "l1")

_FLOAT_NAMES = "float32, float64, bfloat16 or float16"


class BatchHardArguments(NamedTuple):
    embeddings: Tensor  # [N, D]
    labels: Tensor  # int64 [N]
    ref_embeddings: Tensor | None  # [M, D], dtype of embeddings; None: the self form, self-pairs excluded
    ref_labels: Tensor | None  # int64 [M]; None: the self form


class StyleLayer(NamedTuple):
    features: Tensor  # [B, C, *spatial]
    target: Tensor  # [B or 1, C, C], in compute_dtype(features)
    weight: float


class ContentLayer(NamedTuple):
    features: Tensor
    target: Tensor  # shape and dtype of features
    factor: float  # loss = factor * sum (features - target)^2: reduction and layer weight in one


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic, loss and Gram matrix for input `x`: float32 for half inputs, else its own."""
    return x.dtype if x.dtype is torch.float64 else torch.float32


# ---- one check per public function -------------------------------------------------------------------------


def batch_hard(
    function: str,
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    *,
    distance: str,
) -> BatchHardArguments:
    """The tensors of batch_hard_mine and batch_hard_triplet_loss, and the one option that both have."""
    choice(function, "distance", distance, DISTANCES)
    _embeddings(function, "embeddings", embeddings, "[N, D]")
    _labels(function, "labels", labels, "N", "embeddings", embeddings)
    if ref_embeddings is None and ref_labels is None:
        return BatchHardArguments(embeddings, labels, None, None)
    if ref_labels is None:
        raise _error(ValueError, function, "ref_labels", "given together with ref_embeddings", "None")
    if ref_embeddings is None:
        raise _error(ValueError, function, "ref_embeddings", "given together with ref_labels", "None")
    self_form = ref_embeddings is embeddings
    _embeddings(function, "ref_embeddings", ref_embeddings, "[M, D]")
    if ref_embeddings.shape[1] != embeddings.shape[1]:
        expected = f"of shape [M, D]=[M, {embeddings.shape[1]}]"
        raise _error(ValueError, function, "ref_embeddings", expected, _describe(ref_embeddings))
    _same_device(function, "ref_embeddings", ref_embeddings, "embeddings", embeddings)
    embeddings, ref_embeddings = _match_dtypes(
        function, "embeddings", embeddings, "ref_embeddings", ref_embeddings, (embeddings.dtype,)
    )
    _labels(function, "ref_labels", ref_labels, "M", "ref_embeddings", ref_embeddings)
    if self_form:
        return BatchHardArguments(embeddings, labels, None, None)
    return BatchHardArguments(embeddings, labels, ref_embeddings, ref_labels)


def batch_hard_options(
    function: str, *, margin: float, soft: bool, distance: str, reduction: str, return_stats: bool
) -> float:
    """All options of batch_hard_triplet_loss; returns the margin as a float."""
    flag(function, "soft", soft)
    choice(function, "distance", distance, DISTANCES)
    choice(function, "reduction", reduction, TRIPLET_REDUCTIONS)
    flag(function, "return_stats", return_stats)
    return margin_value(function, margin)


def contrastive(
    function: str, x1: Tensor, x2: Tensor, y: Tensor, *, margin: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """All arguments of contrastive_loss; y comes back in the dtype of the arithmetic."""
    margin = contrastive_options(function, margin=margin, reduction=reduction)
    _embeddings(function, "x1", x1, "[N, D]")
    _embeddings(function, "x2", x2, "[N, D]")
    if x2.shape != x1.shape:
        raise _error(ValueError, function, "x2", f"of the shape of x1 {list(x1.shape)}", _describe(x2))
    _same_device(function, "x2", x2, "x1", x1)
    x1, x2 = _match_dtypes(function, "x1", x1, "x2", x2, (x1.dtype,))
    dtypes = INTEGER_DTYPES + FLOAT_DTYPES
    if not _is_dense(y, dtypes) or y.ndim != 1 or y.shape[0] != x1.shape[0]:
        expected = f"bool, integer or float of shape [N]=[{x1.shape[0]}]"
        raise _tensor_error(function, "y", expected, y, dtypes)
    _same_device(function, "y", y, "x1", x1)
    if y.requires_grad:
        got = f"{_describe(y)} with requires_grad=True"
        raise _error(ValueError, function, "y", "a tensor that does not require grad", got)
    return x1, x2, y.to(compute_dtype(x1)), margin


def contrastive_options(function: str, *, margin: float, reduction: str) -> float:
    """All options of contrastive_loss; returns the margin as a float."""
    choice(function, "reduction", reduction, PAIR_REDUCTIONS)
    return margin_value(function, margin)


def gram_matrix(function: str, features: Tensor, *, normalize: str | float) -> None:
    """All arguments of gram_matrix."""
    gram_normalization(function, normalize)
    _features(function, "features", features)


def style(
    function: str,
    features: Tensor | list[Tensor] | tuple[Tensor, ...],
    target: Tensor | list[Tensor] | tuple[Tensor, ...],
    *,
    weights: list[float] | tuple[float, ...] | None,
    normalize: str | float,
    reduction: str,
    distance: str,
) -> list[StyleLayer]:
    """All arguments of style_loss, as a list of layers."""
    style_options(function, weights=weights, normalize=normalize, reduction=reduction, distance=distance)
    layers = []
    for f_name, f, t_name, t, weight in _layers(function, features, target, weights):
        _features(function, f_name, f)
        _same_device(function, f_name, f, "features[0]", layers[0].features if layers else f)
        f, t = _gram_target(function, t_name, t, f_name, f)
        layers.append(StyleLayer(f, t, weight))
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
        if not _is_dense(f, FLOAT_DTYPES) or f.numel() == 0:
            expected = f"{_FLOAT_NAMES} with at least one element"
            raise _tensor_error(function, f_name, expected, f, FLOAT_DTYPES)
        if not _is_dense(t, FLOAT_DTYPES) or t.shape != f.shape:
            expected = f"{_FLOAT_NAMES} of the shape of {f_name} {list(f.shape)}"
            raise _tensor_error(function, t_name, expected, t, FLOAT_DTYPES)
        _same_device(function, f_name, f, "features[0]", layers[0].features if layers else f)
        _same_device(function, t_name, t, f_name, f)
        f, t = _match_dtypes(function, f_name, f, t_name, t, (f.dtype,))
        factor = {"mean": 1.0 / f.numel(), "sum": 1.0, "gatys": 0.5}[reduction]
        layers.append(ContentLayer(f, t, weight * factor))
    return layers


def content_options(
    function: str, *, weights: list[float] | tuple[float, ...] | None, reduction: str
) -> None:
    """All options of content_loss."""
    layer_weights(function, weights)
    choice(function, "reduction", reduction, LAYER_REDUCTIONS)


# ---- single options ----------------------------------------------------------------------------------------


def choice(function: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """A name out of `choices`."""
    if not isinstance(value, str):
        raise _error(TypeError, function, argument, _one_of(choices), _describe(value))
    if value not in choices:
        raise _error(ValueError, function, argument, _one_of(choices), _describe(value))


def flag(function: str, argument: str, value: bool) -> None:
    """True or False; no truthy stand-ins."""
    if not isinstance(value, bool):
        raise _error(TypeError, function, argument, "True or False", _describe(value))


def margin_value(function: str, value: float) -> float:
    """A finite margin >= 0."""
    expected = "a finite number >= 0"
    if not _is_number(value):
        raise _error(TypeError, function, "margin", expected, _describe(value))
    if not 0 <= _float(value) < math.inf:  # NaN fails too
        raise _error(ValueError, function, "margin", expected, _describe(value))
    return float(value)


def gram_normalization(function: str, value: str | float) -> None:
    """A name out of GRAM_NORMALIZATIONS or a positive finite number."""
    expected = f"{_one_of(GRAM_NORMALIZATIONS)} or a finite number > 0"
    if isinstance(value, str):
        valid = value in GRAM_NORMALIZATIONS
    elif _is_number(value):
        valid = 0 < _float(value) < math.inf
    else:
        raise _error(TypeError, function, "normalize", expected, _describe(value))
    if not valid:
        raise _error(ValueError, function, "normalize", expected, _describe(value))


def layer_weights(function: str, value: list[float] | tuple[float, ...] | None) -> None:
    """None, or finite numbers, one per layer; `style` and `content` check how many."""
    if value is None:
        return
    if not isinstance(value, list | tuple):
        expected = "None or a list or tuple of finite numbers"
        raise _error(TypeError, function, "weights", expected, _describe(value))
    for i, weight in enumerate(value):
        if not _is_number(weight):
            raise _error(TypeError, function, f"weights[{i}]", "a finite number", _describe(weight))
        if not -math.inf < _float(weight) < math.inf:
            raise _error(ValueError, function, f"weights[{i}]", "a finite number", _describe(weight))


# ---- tensors -----------------------------------------------------------------------------------------------


def _is_dense(x: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested and x.dtype in dtypes


def _tensor_error(
    function: str, argument: str, expected: str, got: Any, dtypes: tuple[torch.dtype, ...]
) -> TypeError | ValueError:
    """TypeError unless `got` is a dense tensor of one of `dtypes`, which leaves its shape to be wrong."""
    kind = ValueError if _is_dense(got, dtypes) else TypeError
    return _error(kind, function, argument, expected, _describe(got))


def _embeddings(function: str, argument: str, x: Any, shape: str) -> None:
    if not _is_dense(x, FLOAT_DTYPES) or x.ndim != 2 or x.shape[1] == 0:
        expected = f"{_FLOAT_NAMES} of shape {shape} with D >= 1"
        raise _tensor_error(function, argument, expected, x, FLOAT_DTYPES)


def _labels(function: str, argument: str, x: Any, length: str, rows_argument: str, rows: Tensor) -> None:
    if not _is_dense(x, (torch.int64,)) or x.ndim != 1 or x.shape[0] != rows.shape[0]:
        expected = f"int64 of shape [{length}]=[{rows.shape[0]}]"
        raise _tensor_error(function, argument, expected, x, (torch.int64,))
    _same_device(function, argument, x, rows_argument, rows)


def _features(function: str, argument: str, x: Any) -> None:
    if not _is_dense(x, FLOAT_DTYPES) or not 3 <= x.ndim <= 5 or x.numel() == 0:
        expected = f"{_FLOAT_NAMES} of shape [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0"
        raise _tensor_error(function, argument, expected, x, FLOAT_DTYPES)


def _gram_target(
    function: str, argument: str, target: Any, features_argument: str, features: Tensor
) -> tuple[Tensor, Tensor]:
    """The features, and the target as [B or 1, C, C] in the dtype of their Gram matrix."""
    b, c = features.shape[:2]
    if (
        not _is_dense(target, FLOAT_DTYPES)
        or target.ndim not in (2, 3)
        or (target.ndim == 3 and target.shape[0] not in (1, b))
        or target.shape[-2] != c
        or target.shape[-1] != c
    ):
        expected = f"{_FLOAT_NAMES} of shape [C, C], [1, C, C] or [B, C, C] with B={b}, C={c}"
        raise _tensor_error(function, argument, expected, target, FLOAT_DTYPES)
    _same_device(function, argument, target, features_argument, features)
    dtypes = (compute_dtype(features), features.dtype)  # the Gram matrix's own, or half as half features are
    features, target = _match_dtypes(function, features_argument, features, argument, target, dtypes)
    target = target.to(compute_dtype(features))
    return features, target if target.ndim == 3 else target[None]


def _layers(
    function: str, features: Any, target: Any, weights: list[float] | tuple[float, ...] | None
) -> list[tuple[str, Any, str, Any, float]]:
    """(name of features, features, name of target, target, weight) per layer; a bare tensor is one layer."""
    if isinstance(features, Tensor):
        if not isinstance(target, Tensor):
            raise _error(TypeError, function, "target", "a tensor, as features is", _describe(target))
        names, features, target = [("features", "target")], [features], [target]
    else:
        if not isinstance(features, list | tuple):
            expected = "a tensor or a list or tuple of tensors"
            raise _error(TypeError, function, "features", expected, _describe(features))
        count = len(features)
        if count == 0:
            raise _error(ValueError, function, "features", "at least one layer", "an empty sequence")
        if not isinstance(target, list | tuple):
            expected = f"a list or tuple of {count} tensors, as features is"
            raise _error(TypeError, function, "target", expected, _describe(target))
        if len(target) != count:
            expected = f"one tensor per layer of features ({count})"
            raise _error(ValueError, function, "target", expected, str(len(target)))
        names = [(f"features[{i}]", f"target[{i}]") for i in range(count)]
    if weights is None:
        weights = [1.0] * len(features)
    if len(weights) != len(features):
        expected = f"one number per layer of features ({len(features)})"
        raise _error(ValueError, function, "weights", expected, str(len(weights)))
    return [
        (f_name, f, t_name, t, float(weight))
        for (f_name, t_name), f, t, weight in zip(names, features, target, weights, strict=True)
    ]


def _match_dtypes(
    function: str, a_argument: str, a: Tensor, b_argument: str, b: Tensor, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, Tensor]:
    """`b` must have one of `dtypes`, the first for choice; under autocast another mix goes to the widest."""
    if b.dtype in dtypes:
        return a, b
    device = a.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        expected = f"{_name(dtypes[0])} to match {_name(a.dtype)} {a_argument}"
        raise _error(TypeError, function, b_argument, expected, _describe(b))
    widest = torch.promote_types(a.dtype, b.dtype)
    return a.to(widest), b.to(widest)


def _same_device(function: str, argument: str, x: Tensor, other_argument: str, other: Tensor) -> None:
    if x.device != other.device:
        expected = f"on {other.device}, where {other_argument} is"
        raise _error(ValueError, function, argument, expected, f"{_describe(x)} on {x.device}")


# ---- texts -------------------------------------------------------------------------------------------------


def _error(
    kind: type[TypeError] | type[ValueError], function: str, argument: str, expected: str, got: str
) -> TypeError | ValueError:
    return kind(f"{function}: {argument} must be {expected}, got {got}")


def _one_of(choices: tuple[str, ...]) -> str:
    return "one of " + ", ".join(f'"{name}"' for name in choices)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _describe(value: Any) -> str:
    """What was passed, in short: dtype and shape of a tensor, type and value of a number, else the type."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"nested {_name(value.dtype)}"
        layout = "" if value.layout is torch.strided else f"{_name(value.layout)} "
        return f"{layout}{_name(value.dtype)} {list(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Real):
        return f"{type(value).__name__} {value}"
    return type(value).__name__
