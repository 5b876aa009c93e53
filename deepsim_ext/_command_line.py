"""What all commands share: numbers among their options, and how they end."""

from __future__ import annotations

import argparse
import functools
import math
import os
import signal
import sys
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def ends_quietly(main: Callable[P, int]) -> Callable[P, int]:
    """The same, without a traceback at Ctrl-C, and without a word where nobody reads its output any more.

    Exit codes are those that a shell gives for the signals: 130, and 141 as in `command | head -1`.
    """

    @functools.wraps(main)
    def ended(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            try:
                return main(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:
            # Or what is still to be written would fail again while the interpreter ends, which says so.
            for stream in (sys.stdout, sys.stderr):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return 128 + signal.SIGPIPE

    return ended


def number(
    kind: type[int] | type[float], expected: str, holds: Callable[[float], bool]
) -> Callable[[str], float]:
    """An argparse type."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not holds(value):  # NaN never does
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")
        return value

    return parse


def integer(least: int) -> Callable[[str], float]:
    return number(int, f"an integer >= {least}", lambda value: value >= least)


positive = number(float, "a finite number > 0", lambda value: 0 < value < math.inf)
not_negative = number(float, "a finite number >= 0", lambda value: 0 <= value < math.inf)
