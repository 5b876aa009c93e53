"""Peak extra memory of one forward and backward, measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from .. import functional, reference
from .._memory import Call, peak_of_call
from . import torch_versions


def peak_extra_bytes(loss: str, version: str, *sizes: int | str) -> int:
    """Peak of a loss of `LOSSES`, version "deepsim_ext", "reference" or "eager", called with `sizes`."""
    process = subprocess.run(
        [sys.executable, "-m", __name__, loss, version, json.dumps(sizes)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if process.returncode:
        raise RuntimeError(f"memory of {loss}, {version}: {process.stderr.strip() or process.returncode}")
    return int(process.stdout)


def batch_hard(version: str, n: int, d: int, dtype: str) -> tuple[Call, Call]:
    """Batch-hard triplet loss of n embeddings of 10 classes, and of 64."""
    function = {
        "deepsim_ext": lambda x, labels: functional.batch_hard_triplet_loss(x, labels),
        "reference": lambda x, labels: reference.batch_hard_triplet_loss(x, labels),
        "eager": lambda x, labels: torch_versions.batch_hard_triplet_loss(x, labels, 0.2),
    }[version]

    def call(rows: int) -> Call:
        embeddings = torch.randn(rows, d, dtype=getattr(torch, dtype)).requires_grad_()
        labels = torch.arange(rows) % 10
        return lambda: torch.autograd.grad(function(embeddings, labels), embeddings)

    return call(n), call(64)


def style(version: str, side: int) -> tuple[Call, Call]:
    """Style loss of the five VGG19 layers of a side x side picture, and of 16 x 16."""
    function = {
        "deepsim_ext": lambda fs, targets: functional.style_loss(fs, targets),
        "reference": lambda fs, targets: reference.style_loss(fs, targets),
        "eager": lambda fs, targets: torch_versions.style_loss(fs, targets, [1.0] * len(fs)),
    }[version]

    def call(side: int) -> Call:
        channels = (64, 128, 256, 512, 512)
        features = [torch.rand(1, c, side >> n, side >> n).requires_grad_() for n, c in enumerate(channels)]
        targets = [torch.zeros(1, c, c) for c in channels]
        return lambda: torch.autograd.grad(function(features, targets), features)

    return call(side), call(16)


LOSSES = {"batch_hard": batch_hard, "style": style}


if __name__ == "__main__":
    print(peak_of_call(*LOSSES[sys.argv[1]](sys.argv[2], *json.loads(sys.argv[3]))))
