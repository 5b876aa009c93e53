"""What errors say."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor


def error(
    kind: type[TypeError] | type[ValueError], function: str, argument: str, expected: str, got: str
) -> TypeError | ValueError:
    """The one form of all errors."""
    return kind(f"{function}: {argument} must be {expected}, got {got}")


def one_of(choices: tuple[str, ...]) -> str:
    return "one of " + ", ".join(f'"{name}"' for name in choices)


def short_name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def describe(value: Any) -> str:
    """What was passed, in short: dtype and shape of a tensor, type and value of a number, else the type."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"nested {short_name(value.dtype)}"
        layout = "" if value.layout is torch.strided else f"{short_name(value.layout)} "
        return f"{layout}{short_name(value.dtype)} {list(value.shape)}"
    if value is None:
        return "None"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Real):
        return f"{type(value).__name__} {value}"
    return type(value).__name__
