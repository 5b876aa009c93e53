"""Scored pairs: their distances, which of them are the same, thresholds, folds; tensors or NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .options import is_number, to_float
from .tensors import FLOAT_DTYPES, FLOAT_NAMES, INTEGER_DTYPES, is_dense
from .texts import describe, error

ARRAY_FLOATS = (np.float16, np.float32, np.float64)


class ScoredPairs(NamedTuple):
    distances: np.ndarray  # float64 [P], finite
    same: np.ndarray  # bool [P]


def describe_array(value: Any) -> str:
    """`describe`, with the dtype and shape of a NumPy array."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else describe(value)


def distances_array(function: str, distances: Any) -> np.ndarray:
    """Finite float64 [P] of floating distances."""
    if isinstance(distances, Tensor):
        right = is_dense(distances, FLOAT_DTYPES)
    else:
        right = isinstance(distances, np.ndarray) and distances.dtype in ARRAY_FLOATS
    if not right or distances.ndim != 1:
        expected = f"a tensor or array, {FLOAT_NAMES} of shape [P]"
        kind = ValueError if right else TypeError
        raise error(kind, function, "distances", expected, describe_array(distances))
    values = _to_array(distances, torch.float64)
    finite = np.isfinite(values)
    if not finite.all():
        first = int(np.argmin(finite))
        raise error(ValueError, function, "distances", "finite", f"{values[first]} at index {first}")
    return values


def scored_pairs(function: str, distances: Any, same: Any) -> ScoredPairs:
    """Distances and labels of at least one pair."""
    values = distances_array(function, distances)
    if not len(values):
        expected = "of shape [P] with P >= 1"
        raise error(ValueError, function, "distances", expected, describe_array(distances))
    if isinstance(same, Tensor):
        right = is_dense(same, INTEGER_DTYPES + FLOAT_DTYPES)
    else:
        right = isinstance(same, np.ndarray) and same.dtype.kind in "biuf"
    if not right or same.ndim != 1 or len(same) != len(values):
        expected = f"a tensor or array, bool or 0 and 1, of shape [P]=[{len(values)}]"
        raise error(ValueError if right else TypeError, function, "same", expected, describe_array(same))
    labels = _to_array(same, None)
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise error(ValueError, function, "same", "bool or 0 and 1", f"{labels[first]} at index {first}")
    return ScoredPairs(values, labels.astype(bool))


def both_kinds(function: str, pairs: ScoredPairs) -> None:
    """Rates of same and of different pairs need some of each."""
    if pairs.same.all() or not pairs.same.any():
        only = "same" if pairs.same.all() else "different"
        expected = "of both kinds, same and different"
        raise error(ValueError, function, "same", expected, f"{len(pairs.same)} {only} pairs only")


def thresholds_array(function: str, thresholds: Any) -> np.ndarray:
    """Finite float64 [T], ascending, T >= 1."""
    expected = "a tensor, array or sequence of finite ascending numbers"
    values = numbers_array(function, "thresholds", thresholds, expected)
    if (np.diff(values) < 0).any():
        raise error(ValueError, function, "thresholds", expected, "numbers in another order")
    return values


def rates_array(function: str, argument: str, rates: Any) -> np.ndarray:
    """Float64 [R], each in [0, 1], R >= 1."""
    expected = "a tensor, array or sequence of numbers from 0 to 1"
    values = numbers_array(function, argument, rates, expected)
    outside = (values < 0) | (values > 1)
    if outside.any():
        raise error(ValueError, function, argument, expected, f"{values[np.argmax(outside)]} among them")
    return values


def numbers_array(function: str, argument: str, values: Any, expected: str) -> np.ndarray:
    """Float64 [T] of finite numbers, T >= 1."""
    if isinstance(values, Tensor):
        right = is_dense(values, INTEGER_DTYPES[1:] + FLOAT_DTYPES)
    elif isinstance(values, np.ndarray):
        right = values.dtype.kind in "iuf"
    else:
        right = isinstance(values, Sequence) and all(is_number(value) for value in values)
    if not right:
        raise error(TypeError, function, argument, expected, describe_array(values))
    if not isinstance(values, Tensor | np.ndarray):
        values = np.array([to_float(value) for value in values])
    array = _to_array(values, torch.float64)
    if array.ndim != 1 or not array.size:
        raise error(ValueError, function, argument, expected, f"shape {list(array.shape)}")
    finite = np.isfinite(array)
    if not finite.all():
        raise error(ValueError, function, argument, expected, f"{array[np.argmin(finite)]} among them")
    return array


def number(function: str, argument: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number from `low` to `high`."""
    expected = "a finite number" if math.isinf(low) else f"a number from {low:g} to {high:g}"
    if not is_number(value):
        raise error(TypeError, function, argument, expected, describe(value))
    if not (low <= to_float(value) <= high and math.isfinite(to_float(value))):
        raise error(ValueError, function, argument, expected, describe(value))
    return float(value)


def fold_count(function: str, folds: Any, pairs: int) -> int:
    """How many folds `pairs` pairs are cut into: each has one at least."""
    expected = f"an integer from 2 to the number of pairs P={pairs}"
    if not isinstance(folds, Integral) or isinstance(folds, bool):
        raise error(TypeError, function, "folds", expected, describe(folds))
    if not 2 <= folds <= pairs:
        raise error(ValueError, function, "folds", expected, describe(folds))
    return int(folds)


def _to_array(x: Tensor | np.ndarray, dtype: torch.dtype | None) -> np.ndarray:
    """An array of the values; float64 if `dtype` says so, and of bfloat16, which NumPy lacks."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.double() if dtype is torch.float64 or x.dtype is torch.bfloat16 else x).numpy()
    return x.astype(np.float64) if dtype is torch.float64 else x
