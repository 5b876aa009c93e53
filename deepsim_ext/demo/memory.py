"""Peak extra memory of one forward and backward, measured in a fresh process.

After a call on a tiny input, which loads the libraries and starts the threads, it is the highest resident set
during the call minus the resident set just before it. So it counts everything that the call makes resident,
gradient and BLAS buffers included, and leaves out the inputs. Linux resets and reports that mark (VmHWM);
elsewhere the growth of ru_maxrss stands in, which can only come out too small.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from .. import functional, reference
from . import torch_versions

Call = Callable[[], object]


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


def peak_of_call(call: Call, warm_up: Call) -> int:
    """Bytes by which the resident set of this process grows at most while `call` runs."""
    warm_up()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc: hand free heap pages back, or their reuse would not be seen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    except OSError:
        before = _max_rss()
        call()
        return _max_rss() - before
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(name: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def _max_rss() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(peak_of_call(*LOSSES[sys.argv[1]](sys.argv[2], *json.loads(sys.argv[3]))))
