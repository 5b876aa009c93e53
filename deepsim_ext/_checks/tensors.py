"""Tensors: layout, dtype, shape, device, and what goes together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .texts import describe, error, short_name

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGER_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOAT_NAMES = "float32, float64, bfloat16 or float16"


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of arithmetic, loss and Gram matrix for input `x`: float32 for half inputs, else its own."""
    return x.dtype if x.dtype is torch.float64 else torch.float32


def is_dense(x: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested and x.dtype in dtypes


def tensor_error(
    function: str, argument: str, expected: str, got: Any, dtypes: tuple[torch.dtype, ...]
) -> TypeError | ValueError:
    """TypeError unless `got` is a dense tensor of one of `dtypes`, which leaves its shape to be wrong."""
    kind = ValueError if is_dense(got, dtypes) else TypeError
    return error(kind, function, argument, expected, describe(got))


def check_embeddings(function: str, argument: str, x: Any, shape: str) -> None:
    if not is_dense(x, FLOAT_DTYPES) or x.ndim != 2 or x.shape[1] == 0:
        expected = f"{FLOAT_NAMES} of shape {shape} with D >= 1"
        raise tensor_error(function, argument, expected, x, FLOAT_DTYPES)


def check_labels(function: str, argument: str, x: Any, length: str, rows_argument: str, rows: Tensor) -> None:
    if not is_dense(x, (torch.int64,)) or x.ndim != 1 or x.shape[0] != rows.shape[0]:
        expected = f"int64 of shape [{length}]=[{rows.shape[0]}]"
        raise tensor_error(function, argument, expected, x, (torch.int64,))
    check_device(function, argument, x, rows_argument, rows)


def check_columns(
    function: str, argument: str, x: Tensor, length: str, other_argument: str, other: Tensor
) -> None:
    """As many columns as `other`, and on its device."""
    if x.shape[1] != other.shape[1]:
        expected = f"of shape [{length}, D]=[{length}, {other.shape[1]}]"
        raise error(ValueError, function, argument, expected, describe(x))
    check_device(function, argument, x, other_argument, other)


def check_same_shape(function: str, argument: str, x: Tensor, other_argument: str, other: Tensor) -> None:
    """Of the shape of `other`, and on its device."""
    if x.shape != other.shape:
        expected = f"of the shape of {other_argument} {list(other.shape)}"
        raise error(ValueError, function, argument, expected, describe(x))
    check_device(function, argument, x, other_argument, other)


def check_device(function: str, argument: str, x: Tensor, other_argument: str, other: Tensor) -> None:
    if x.device != other.device:
        expected = f"on {other.device}, where {other_argument} is"
        raise error(ValueError, function, argument, expected, f"{describe(x)} on {x.device}")


def match_dtypes(
    function: str, a_argument: str, a: Tensor, b_argument: str, b: Tensor, dtypes: tuple[torch.dtype, ...]
) -> tuple[Tensor, Tensor]:
    """`b` must have one of `dtypes`, the first for choice; under autocast another mix goes to the widest."""
    if b.dtype in dtypes:
        return a, b
    device = a.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        expected = f"{short_name(dtypes[0])} to match {short_name(a.dtype)} {a_argument}"
        raise error(TypeError, function, b_argument, expected, describe(b))
    widest = torch.promote_types(a.dtype, b.dtype)
    return a.to(widest), b.to(widest)
