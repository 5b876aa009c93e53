"""What is logged: lines of JSON, and the same for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from ..._files import write_beside

NAME = "log.jsonl"


class Log:
    """The records of a run up to a step, and those that follow.

    Args:
        folder: of the run.
        step: where it goes on, 0 for the start; what a killed run logged later is removed.
        tensorboard: write event files too.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        path = folder / NAME
        if path.exists():
            kept = [line for line in _whole_lines(path) if step and json.loads(line)["step"] <= step]
            write_beside(path, lambda file: file.write(b"".join(kept)))
        self._file = open(path, "ab")  # noqa: SIM115
        self._writer = None
        if tensorboard:
            self._writer = summary_writer()(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """A record; what is not finite becomes null."""
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step} | values).encode() + b"\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", math.nan if value is None else value, step)

    def sync(self) -> None:
        """Down to the disk."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def summary_writer() -> type:
    """TensorBoard's SummaryWriter; ImportError says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as problem:
        raise ImportError('tensorboard not installed; pip install "deepsim-ext[train]"') from problem
    return SummaryWriter
