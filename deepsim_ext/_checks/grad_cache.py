"""Gradients in chunks: the model, its inputs, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .options import positive_integer
from .tensors import FLOAT_DTYPES, FLOAT_NAMES, check_columns, is_dense, tensor_error
from .texts import describe, error


def cached_backward(
    function: str, model: nn.Module, inputs: Any, loss: Any, *, chunk_size: int | None, scaler: Any
) -> list[Any]:
    """All arguments of cached_backward; returns the chunks."""
    if not isinstance(model, nn.Module):
        raise error(TypeError, function, "model", "an nn.Module", describe(model))
    if not callable(loss):
        raise error(TypeError, function, "loss", "a function of the embeddings", describe(loss))
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise error(TypeError, function, "scaler", "a torch.amp.GradScaler or None", describe(scaler))
    if not isinstance(inputs, list):
        return _split(function, inputs, positive_integer(function, "chunk_size", chunk_size))
    if chunk_size is not None:
        expected = "None where inputs is a list of chunks"
        raise error(ValueError, function, "chunk_size", expected, describe(chunk_size))
    if not inputs:
        raise error(ValueError, function, "inputs", "at least one chunk", "an empty list")
    return inputs


def chunk_embeddings(function: str, x: Any, first: Tensor | None) -> Tensor:
    """What the model makes of one chunk; `first` is what it made of the first one."""
    argument = "the output of model"
    if not is_dense(x, FLOAT_DTYPES) or x.ndim != 2 or x.numel() == 0:
        expected = f"{FLOAT_NAMES} of shape [n, D] with n >= 1 and D >= 1"
        raise tensor_error(function, argument, expected, x, FLOAT_DTYPES)
    if first is not None:
        check_columns(function, argument, x, "n", "the first chunk's", first)
    return x


def trained_embeddings(function: str, x: Tensor) -> Tensor:
    """What the model makes of a chunk in the second pass, with a graph."""
    if not x.requires_grad:
        expected = "of parameters or inputs that require grad"
        raise error(ValueError, function, "the output of model", expected, "one without a gradient")
    return x


def loss_value(function: str, result: Any) -> Tensor:
    """The loss of what the function of the embeddings returned."""
    argument, value = "the result of loss", getattr(result, "loss", result)
    if not is_dense(value, FLOAT_DTYPES) or value.ndim != 0:
        expected = f"a {FLOAT_NAMES} scalar, or a named tuple with such a loss"
        raise tensor_error(function, argument, expected, value, FLOAT_DTYPES)
    if not value.requires_grad:
        raise unrelated_loss(function)
    return value


def unrelated_loss(function: str) -> ValueError:
    expected = "a function of the embeddings, with a gradient"
    return error(ValueError, function, "the result of loss", expected, "one without")


def _split(function: str, inputs: Any, chunk_size: int) -> list[Any]:
    """Chunks of the same structure as `inputs`."""
    if isinstance(inputs, Tensor):
        named = {"inputs": inputs}
    elif isinstance(inputs, tuple):
        named = {f"inputs[{i}]": x for i, x in enumerate(inputs)}
    elif isinstance(inputs, Mapping):
        named = {f"inputs[{key!r}]": x for key, x in inputs.items()}
    else:
        expected = "a tensor, a tuple or dict of tensors, or a list of chunks"
        raise error(TypeError, function, "inputs", expected, describe(inputs))
    if not named:
        raise error(ValueError, function, "inputs", "at least one tensor", f"an empty {describe(inputs)}")
    rows = None
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise error(TypeError, function, name, "a tensor", describe(x))
        if x.ndim == 0 or x.shape[0] == 0:
            raise error(ValueError, function, name, "of shape [N, ...] with N >= 1", describe(x))
        rows = rows or x.shape[0]
        if x.shape[0] != rows:
            raise error(ValueError, function, name, f"of shape [N, ...]=[{rows}, ...]", describe(x))
    parts = zip(*(x.split(chunk_size) for x in named.values()), strict=True)
    if isinstance(inputs, Tensor):
        return [part for (part,) in parts]
    return [part if isinstance(inputs, tuple) else dict(zip(inputs, part, strict=True)) for part in parts]
