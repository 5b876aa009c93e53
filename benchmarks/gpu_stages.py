"""`python -m benchmarks.gpu_stages FOLDER`: what each kernel of a training step takes on a GPU.

From the profiler's records of the device, in the order in which the kernels run, beside which
results/gpu_expected.md says what each should take. Writes FOLDER/gpu_stages.md.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import deepsim_ext
from tests.samples import VGG19_LAYERS, balanced_labels

from .gpu import PRECISIONS

BATCH_HARD = (
    (256, 128, "float32"),
    (1024, 128, "float32"),
    (4096, 128, "float32"),
    (16384, 128, "float32"),
    (16384, 128, "tf32"),
    (16384, 128, "bfloat16"),
    (16384, 512, "float32"),
    (16384, 512, "bfloat16"),
    (65536, 128, "float32"),
)
STYLE = ((256, "float32"), (512, "float32"), (1024, "float32"), (512, "bfloat16"))
PAIRS = {
    "batch_all": deepsim_ext.batch_all_triplet_loss,
    "semi_hard": deepsim_ext.batch_semi_hard_triplet_loss,
    "contrastive": deepsim_ext.batch_contrastive_loss,
    "easy_semihard": partial(deepsim_ext.batch_hard_triplet_loss, positive="easy", negative="semihard"),
}
RUNS = 5


def batch_step(
    n: int, d: int, precision: str, loss: Callable[..., Any] = deepsim_ext.batch_hard_triplet_loss
) -> Callable[[], Any]:
    x = torch.randn(n, d, device="cuda").to(PRECISIONS[precision][0]).requires_grad_()
    labels = balanced_labels(n, 4).cuda()
    return lambda: torch.autograd.grad(loss(x, labels), x)


def style_step(side: int, precision: str) -> Callable[[], Any]:
    features = [
        torch.randn(1, c, side // f, side // f, device="cuda").relu().to(PRECISIONS[precision][0])
        for c, f in VGG19_LAYERS.values()
    ]
    targets = [torch.randn(1, f.shape[1], f.shape[1], device="cuda") * 1e-3 for f in features]
    leaves = [f.requires_grad_() for f in features]
    return lambda: torch.autograd.grad(deepsim_ext.style_loss(leaves, targets), leaves)


def search_step(n: int) -> Callable[[], Any]:
    x = torch.randn(n, 128, device="cuda")
    return lambda: deepsim_ext.nearest_neighbors(x, None, 10)


def cases() -> dict[str, tuple[str, Callable[[], Callable[[], Any]]]]:
    """Precision and step of each case."""
    found: dict[str, tuple[str, Callable[[], Callable[[], Any]]]] = {}
    for n, d, precision in BATCH_HARD:
        found[f"batch_hard N={n} D={d} {precision}"] = precision, partial(batch_step, n, d, precision)
    for side, precision in STYLE:
        found[f"style {side}x{side} {precision}"] = precision, partial(style_step, side, precision)
    for name, loss in PAIRS.items():
        found[f"{name} N=4096 D=128"] = "float32", partial(batch_step, 4096, 128, "float32", loss)
    found["neighbors N=16384 D=128 k=10"] = "float32", partial(search_step, 16384)
    return found


def stages(step: Callable[[], Any]) -> list[tuple[str, float]]:
    """Name and microseconds of what runs on the device in one step, in order; the median of a few steps."""
    step()
    torch.cuda.synchronize()
    runs: list[list[tuple[str, float]]] = []
    for _ in range(RUNS):
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize()
        events = [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        events.sort(key=lambda e: e.time_range.start)
        runs.append([(e.name, e.time_range.elapsed_us()) for e in events])
    names = [name for name, _ in runs[-1]]
    alike = [run for run in runs if [name for name, _ in run] == names]
    return [
        (short(name), sorted(run[i][1] for run in alike)[len(alike) // 2]) for i, name in enumerate(names)
    ]


def short(name: str) -> str:
    """A kernel's name without namespaces, template and parameters."""
    found = re.search(r"(\w+_kernel)\b", name) or re.search(r"(\w+)(<|\(|$)", name)
    return found[1] if found else name


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stages", description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    lines = [f"# {torch.cuda.get_device_name()}, torch {torch.__version__}: microseconds on the device", ""]
    lines += ["| case | sum | kernels |", "| --- | ---: | --- |"]
    for case, (precision, make) in cases().items():
        torch.backends.cuda.matmul.allow_tf32 = PRECISIONS[precision][1]
        found = stages(make())
        # What a kernel takes in all of its launches, in order of the first.
        sums: dict[str, list[float]] = {}
        for name, microseconds in found:
            sums.setdefault(name, []).append(microseconds)
        parts = ", ".join(
            f"{len(each)} × {name} {sum(each):.1f}" if len(each) > 1 else f"{name} {each[0]:.1f}"
            for name, each in sums.items()
        )
        lines.append(f"| {case} | {sum(m for _, m in found):.0f} | {parts} |")
        print(lines[-1], flush=True)
        (options.folder / "gpu_stages.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
