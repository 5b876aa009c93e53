"""Checkpoints that are there whole or not at all, by torch.distributed.checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.stateful import Stateful

KEPT = 2
PREFIX, PART = "step_", ".part"


def clean(folder: Path) -> None:
    """Makes the folder, and removes what a killed run did not finish. For one process, before all others."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(f"*{PART}"):
        shutil.rmtree(part)


def steps(folder: Path) -> list[int]:
    """Of the checkpoints in the folder, ascending."""
    names = (path.name.removeprefix(PREFIX) for path in folder.glob(f"{PREFIX}*"))
    return sorted(int(name) for name in names if name.isdecimal())


def save(folder: Path, step: int, state: Stateful, rank: int) -> None:
    """Writes a checkpoint, called by all processes, and then removes all but the last two.

    It is written under another name, down to the disk, and renamed.
    """
    path = folder / f"{PREFIX}{step:09}"
    part = path.with_name(path.name + PART)
    dcp.save({"training": state}, checkpoint_id=part)
    if rank == 0:
        _sync(part)
        part.rename(path)
        _sync(folder)
        for old in steps(folder)[:-KEPT]:
            _remove(folder / f"{PREFIX}{old:09}")


def load(folder: Path, step: int, state: Stateful) -> None:
    """Gives `state`, in all processes, what was saved at that step."""
    path = folder / f"{PREFIX}{step:09}"
    dcp.load({"training": state}, checkpoint_id=path)


def _remove(path: Path) -> None:
    """Takes the name away first: what is half removed is no checkpoint."""
    part = path.with_name(path.name + PART)
    path.rename(part)
    shutil.rmtree(part)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
