"""Single options: names, flags, margins."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from .texts import describe, error, one_of

DISTANCES = ("euclidean", "sqeuclidean", "cosine")
BATCH_REDUCTIONS = ("mean", "mean_nonzero", "sum")
TRIPLET_REDUCTIONS = (*BATCH_REDUCTIONS, "none")
PAIR_REDUCTIONS = ("mean", "sum", "none")


def choice(function: str, argument: str, value: str, choices: tuple[str, ...]) -> None:
    """A name out of `choices`."""
    if not isinstance(value, str):
        raise error(TypeError, function, argument, one_of(choices), describe(value))
    if value not in choices:
        raise error(ValueError, function, argument, one_of(choices), describe(value))


def flag(function: str, argument: str, value: bool) -> None:
    """True or False; no truthy stand-ins."""
    if not isinstance(value, bool):
        raise error(TypeError, function, argument, "True or False", describe(value))


def margin_value(function: str, argument: str, value: float) -> float:
    """A finite margin >= 0."""
    expected = "a finite number >= 0"
    if not is_number(value):
        raise error(TypeError, function, argument, expected, describe(value))
    if not 0 <= to_float(value) < math.inf:  # NaN fails too
        raise error(ValueError, function, argument, expected, describe(value))
    return float(value)


def positive_integer(function: str, argument: str, value: int) -> int:
    """An integer >= 1."""
    expected = "an integer >= 1"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise error(TypeError, function, argument, expected, describe(value))
    if value < 1:
        raise error(ValueError, function, argument, expected, describe(value))
    return int(value)


def integer_in(function: str, argument: str, value: int, least: int, most: int) -> int:
    """An integer from `least` to `most`."""
    expected = f"an integer from {least} to {most}"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise error(TypeError, function, argument, expected, describe(value))
    if not least <= value <= most:
        raise error(ValueError, function, argument, expected, describe(value))
    return int(value)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def to_float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf
