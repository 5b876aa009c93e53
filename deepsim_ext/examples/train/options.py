"""The options of the command."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..._command_line import integer, not_negative, number, positive
from .training import AMP, LOSSES, SCHEDULES

LEAST_SIDE = 16  # of images: the network halves them four times
# Those that may be others when a run goes on: they leave the curve as it is.
FREE = ("data", "out", "resume", "workers", "device", "log_every", "checkpoint_every", "tensorboard")


def parser() -> argparse.ArgumentParser:
    """The command's; its namespace is what `training.run` takes as settings."""
    result = argparse.ArgumentParser(
        prog="python -m deepsim_ext.examples.train",
        description="Train an embedding network, in one process or, under torchrun, in many.",
    )
    group = result.add_argument_group("data and files")

    def add(name: str, help: str, **options: object) -> None:
        shown = "" if options.get("default") is None else " (default: %(default)s)"
        group.add_argument(name, help=help + shown, **options)

    at_least_1, at_least_2 = integer(1), integer(2)
    fraction = number(float, "in [0, 1)", lambda value: 0 <= value < 1)

    add("--data", '"digits", or a folder with a subfolder of images for each class', required=True)
    add("--out", "folder of the run, the same for all processes", type=Path, required=True)
    add("--resume", "go on from the last checkpoint in --out, or start if there is none", action="store_true")
    add("--image-size", "side that images of a folder get", type=integer(LEAST_SIDE), default=64)
    add("--held-out", "share of each class to evaluate on, not to train on", type=fraction, default=0.2)
    add("--augment", "turn, resize and shift images a little", action="store_true")

    group = result.add_argument_group("batches", "of all processes together, which share the classes")
    add("--classes", "P: classes of a batch, a multiple of the processes", type=at_least_2, default=8)
    add("--samples", "K: images of each class", type=at_least_2, default=4)

    group = result.add_argument_group("learning")
    add("--loss", "loss of the batch", choices=LOSSES, default="batch_hard")
    add(
        "--margin",
        "of the loss, for contrastive that of negative pairs (default: its own)",
        type=not_negative,
    )
    add("--embedding-size", "numbers in an embedding", type=at_least_1, default=64)
    add("--epochs", "passes over all images", type=at_least_1, default=10)
    add("--lr", "learning rate of AdamW", type=positive, default=1e-3)
    add("--schedule", "of the learning rate", choices=SCHEDULES, default="cosine")
    add("--weight-decay", "of AdamW", type=not_negative, default=1e-2)
    add("--amp", "autocast to this dtype (default: float32 throughout)", choices=AMP)
    seed = number(int, "an integer from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
    add("--seed", "of weights, batches and all else", type=seed, default=0)

    group = result.add_argument_group("running")
    add("--device", "default: cuda if there is one", choices=("cpu", "cuda"))
    add("--workers", "that read images, for each process", type=integer(0), default=0)
    add("--log-every", "steps", type=at_least_1, default=1)
    add("--checkpoint-every", "steps", type=at_least_1, default=100)
    add("--tensorboard", "write event files too", action="store_true")
    return result
