"""Embeddings, labels and pairs of rows, as tensors or NumPy arrays."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .options import positive_integer
from .tensors import FLOAT_DTYPES, FLOAT_NAMES, INTEGER_DTYPES, is_dense
from .texts import describe, error
from .verification import ARRAY_FLOATS, describe_array


def embeddings(function: str, x: Any) -> None:
    """Floating, [N, D] with D >= 1."""
    if isinstance(x, Tensor):
        right = is_dense(x, FLOAT_DTYPES)
    else:
        right = isinstance(x, np.ndarray) and x.dtype in ARRAY_FLOATS
    if not right or x.ndim != 2 or x.shape[1] == 0:
        expected = f"a tensor or array, {FLOAT_NAMES} of shape [N, D] with D >= 1"
        raise error(ValueError if right else TypeError, function, "embeddings", expected, describe_array(x))


def labels_array(function: str, labels: Any, rows: int | None = None) -> np.ndarray:
    """int64 [N]."""
    right = _is_integer(labels)
    if not right or labels.ndim != 1 or (rows is not None and len(labels) != rows):
        shape = "[N]" if rows is None else f"[N]=[{rows}]"
        expected = f"a tensor or array of integers of shape {shape}"
        raise error(ValueError if right else TypeError, function, "labels", expected, describe_array(labels))
    return _int64(labels)


def pairs_array(function: str, pairs: Any, rows: int) -> np.ndarray:
    """int64 [P, 2], each from 0 to rows - 1."""
    right = _is_integer(pairs)
    if not right or pairs.ndim != 2 or pairs.shape[1] != 2:
        expected = "a tensor or array of integers of shape [P, 2]"
        raise error(ValueError if right else TypeError, function, "pairs", expected, describe_array(pairs))
    indices = _int64(pairs)
    outside = (indices < 0) | (indices >= rows)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        expected = f"indices of the N={rows} rows of embeddings, from 0"
        raise error(ValueError, function, "pairs", expected, f"{indices[row, column]} in row {row}")
    return indices


def pair_count(function: str, count: Any, same: int, different: int) -> int:
    """How many pairs of each kind, of which there are so many."""
    most = min(same, different)
    if positive_integer(function, "count", count) > most:
        expected = f"at most {most}, for there are {same} same and {different} different pairs"
        raise error(ValueError, function, "count", expected, describe(count))
    return int(count)


def seed(function: str, value: Any) -> int:
    """An integer >= 0."""
    expected = "an integer >= 0"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise error(TypeError, function, "seed", expected, describe(value))
    if value < 0:
        raise error(ValueError, function, "seed", expected, describe(value))
    return int(value)


def _is_integer(x: Any) -> bool:
    """Integers that int64 holds."""
    if isinstance(x, Tensor):
        return is_dense(x, INTEGER_DTYPES[1:])
    return isinstance(x, np.ndarray) and x.dtype.kind in "iu" and np.can_cast(x.dtype, np.int64)


def _int64(x: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(x, Tensor):
        return x.detach().to("cpu", torch.int64).numpy()
    return x.astype(np.int64)
