"""How a signal stops a run: between its steps."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_between_steps(*numbers: signal.Signals) -> Iterator[Callable[[], int]]:
    """Holds these signals back, and says which of them came, or 0; a second one is not held back.

    An exception that a handler raises comes out of any line there is, of libraries too: some keep it for
    themselves, and others wait for what it has taken away.
    """
    came = 0
    before = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = number
        restore()

    for number in numbers:
        before[number] = signal.signal(number, note)
    try:
        yield lambda: came
    finally:
        restore()
