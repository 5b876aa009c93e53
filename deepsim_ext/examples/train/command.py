"""The command: what it refuses, and how it ends."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..._command_line import ends_quietly
from ..._files import write_beside
from ..._stop import stop_between_steps
from . import data, log, options, training

# import name -> name on PyPI
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "tqdm": "tqdm"}


@ends_quietly
def main(argv: Sequence[str] | None = None) -> int:
    """Trains; exit code 0, 1 for a missing package, 2 for unusable input, 128 + its number for a signal."""
    settings = options.parser().parse_args(argv)
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = _device(settings.device)
        loaded, parts, record = _checked(settings, count)
    except ImportError as problem:
        print(f"train: {problem}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as problem:
        print(f"train: {problem}", file=sys.stderr)
        return 2
    try:
        with _process_group(device), stop_between_steps(*training.SIGNALS) as stopped:
            if rank == 0:
                _write_settings(settings.out, record)
            number = training.run(settings, loaded, parts, training.Processes(rank, count, device), stopped)
    except KeyboardInterrupt:  # while the processes meet, or a second one
        number = signal.SIGINT
    if number == 0:
        return 0
    if rank == 0:
        name = signal.Signals(number).name
        print(f"train: stopped by {name}; --resume goes on from the last checkpoint", file=sys.stderr)
    return 128 + number


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Of the processes that torchrun started, or of this one; all of them have looked at --out by then."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **alone)
    try:
        dist.barrier()
        yield
    finally:
        dist.destroy_process_group()


def _write_settings(out: Path, record: dict[str, object]) -> None:
    text = json.dumps(record, indent=2) + "\n"
    write_beside(out / "settings.json", lambda file: file.write(text.encode()))


# ---- what is refused, by all processes alike ---------------------------------------------------------------


def _device(name: str | None) -> torch.device:
    """Of this process: the one of its number on the machine, if there are any."""
    available = torch.cuda.device_count()
    if (name or ("cuda" if available else "cpu")) == "cpu":
        return torch.device("cpu")
    needed = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > available:
        raise ValueError(f"--device cuda: {needed} processes on a machine with {available} CUDA devices")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _checked(
    settings: argparse.Namespace, count: int
) -> tuple[data.Data, tuple[Tensor, Tensor], dict[str, object]]:
    """The data, its rows to train on and to hold out, and what settings.json says."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'{", ".join(missing)} not installed; pip install "deepsim-ext[train]"')
    if settings.tensorboard:
        log.summary_writer()
    if settings.classes % count:
        raise ValueError(f"--classes {settings.classes}: must be a multiple of the {count} processes")
    loaded = data.load(settings.data, settings.image_size)
    if settings.classes > len(loaded.classes):
        raise ValueError(f"--classes {settings.classes}: {settings.data} has only {len(loaded.classes)}")
    parts = data.split(loaded.labels, settings.held_out, settings.seed)
    if settings.held_out and not len(parts[1]):
        raise ValueError(
            f"--held-out {settings.held_out:g}: no class has the 4 images that this takes; give 0"
        )
    record = {name: value for name, value in vars(settings).items() if name not in options.FREE}
    record["fingerprint of the data"] = loaded.fingerprint
    _check_out(settings, record)
    return loaded, parts, record


def _check_out(settings: argparse.Namespace, record: dict[str, object]) -> None:
    """Makes the folder. A new run does not touch another; one that goes on is the same."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / "settings.json"
    if not path.exists():
        return
    if not settings.resume:
        raise ValueError(f"--out {settings.out}: there is a run in it; --resume goes on with it")
    before = json.loads(path.read_text())
    for name, value in record.items():
        if before.get(name) != value:
            option = name if " " in name else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value}: the run in {settings.out} has {before.get(name)}")
