"""Galleries: options, names, rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .options import DISTANCES, choice, is_number, margin_value, positive_integer
from .tensors import FLOAT_DTYPES, is_dense, tensor_error
from .texts import describe, error, short_name

BACKENDS = ("auto", "exact", "faiss")
TEMPLATE_DTYPES = (torch.float32, torch.float64)


def gallery_options(
    function: str, *, embedding_size: int, distance: str, dtype: torch.dtype, backend: str
) -> int:
    """The options of a Gallery but its threshold; returns embedding_size as an int."""
    choice(function, "distance", distance, DISTANCES)
    choice(function, "backend", backend, BACKENDS)
    if dtype not in TEMPLATE_DTYPES:
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        got = short_name(dtype) if isinstance(dtype, torch.dtype) else describe(dtype)
        raise error(kind, function, "dtype", "torch.float32 or torch.float64", got)
    return positive_integer(function, "embedding_size", embedding_size)


def threshold(function: str, value: float | None) -> float | None:
    """None, or a finite number >= 0 as a float."""
    return None if value is None else margin_value(function, "threshold", value)


def identity_name(function: str, value: Any) -> None:
    """A name that every file and terminal can have."""
    expected = "a str of at least one character"
    if not isinstance(value, str):
        raise error(TypeError, function, "identity", expected, describe(value))
    if not value:
        raise error(ValueError, function, "identity", expected, describe(value))
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise error(ValueError, function, "identity", "a str without surrogates", ascii(value))


def gallery_rows(
    function: str, argument: str, x: Tensor, length: str, embedding_size: int, dtype: torch.dtype
) -> Tensor:
    """Embeddings for a gallery of `dtype`: [length, D] of [length, D] or [D]."""
    dtypes = tuple(d for d in FLOAT_DTYPES if torch.promote_types(d, dtype) is dtype)
    if is_dense(x, dtypes) and x.ndim == 1:
        x = x[None]
    if not is_dense(x, dtypes) or x.ndim != 2 or x.shape[1] != embedding_size:
        names = " or ".join(short_name(d) for d in dtypes)
        expected = f"{names} of shape [{length}, D]=[{length}, {embedding_size}] or [D]"
        raise tensor_error(function, argument, expected, x, dtypes)
    return x


def rates(function: str, argument: str, value: Any) -> list[float]:
    """Numbers from 0 to 1 as floats."""
    expected = "a list or tuple of numbers from 0 to 1"
    if not isinstance(value, list | tuple):
        raise error(TypeError, function, argument, expected, describe(value))
    for rate in value:
        if not is_number(rate):
            raise error(TypeError, function, argument, expected, f"{describe(rate)} among them")
        if not 0 <= rate <= 1:  # NaN fails too
            raise error(ValueError, function, argument, expected, f"{describe(rate)} among them")
    return [float(rate) for rate in value]


def probe_identities(function: str, probes: Any, identities: Any) -> None:
    """One name or None for every row of probes; what probes are is for the gallery to check."""
    expected = "a list or tuple of names or None"
    if not isinstance(identities, list | tuple):
        raise error(TypeError, function, "identities", expected, describe(identities))
    for identity in identities:
        if identity is not None and not isinstance(identity, str):
            raise error(TypeError, function, "identities", expected, f"{describe(identity)} among them")
    rows = len(probes) if isinstance(probes, Tensor) and probes.ndim == 2 else 1
    if len(identities) != rows:
        raise error(ValueError, function, "identities", f"one per probe ({rows})", str(len(identities)))


def names_of_rows(function: str, identity: Any, rows: int) -> list[str]:
    """The identity of every row, of one name for all or of one each."""
    if rows == 0:
        raise error(ValueError, function, "embeddings", "of at least one row", "none")
    if not isinstance(identity, list | tuple):
        identity_name(function, identity)
        return [identity] * rows
    if len(identity) != rows:
        raise error(ValueError, function, "identity", f"one per row ({rows})", str(len(identity)))
    for name in identity:
        identity_name(function, name)
    return list(identity)
