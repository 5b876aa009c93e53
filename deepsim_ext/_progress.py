"""A bar of how far a long call has come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ._checks.options import flag
from ._references import Advance


@contextmanager
def progress_bar(function: str, progress: bool, total: int, unit: str) -> Iterator[Advance]:
    """Nothing is shown without `progress`."""
    flag(function, "progress", progress)
    if not progress:
        yield lambda _: None
        return
    try:
        from tqdm import tqdm
    except ImportError as problem:
        raise ImportError(f"{function}: tqdm not installed; pip install deepsim-ext[eval]") from problem
    with tqdm(desc=function, total=total, unit=unit, unit_scale=True) as bar:
        yield bar.update
