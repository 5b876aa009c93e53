"""`python -m benchmarks.scaling`: time and peak memory of forward + backward from small inputs to large ones.

Batch-hard from 256 to 65,536 embeddings of dimension 128, style loss from 64 to 512 channels of 128 x 128
positions, beside the torch versions until these no longer fit into memory or a step takes longer than a few
seconds. Writes results/scaling_*.json and the plots of the README.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from tqdm import tqdm

from . import bench_batch_hard, bench_style
from .environment import environment
from .memory import memory_record
from .report import COLOURS
from .timing import Contender, Inputs, Record, fresh_leaves, run_once

ROWS, DIMENSION = [2**k for k in range(8, 17)], 128
CHANNELS, SIDE = [64, 128, 256, 512], 128
BATCH_HARD = ("deepsim_ext", "torch eager", "torch row-chunked", "pytorch-metric-learning")
STYLE = ("deepsim_ext", "torch eager", "one-GEMM Function")
RUNS, LONGEST_STEP = 5, 4.0  # seconds


def style_inputs(channels: int) -> Inputs:
    return bench_style.draw([(1, channels, SIDE, SIDE)])


def style_probe(name: str, channels: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One forward + backward of the contender `name`, and a small one to warm up (see memory.py)."""
    contender = next(c for c in bench_style.contenders("left out") if c.name == name)

    def step(inputs: Inputs) -> Callable[[], object]:
        leaves = fresh_leaves(contender, inputs)
        return lambda: contender.function(leaves, inputs.constants).backward()

    return step(style_inputs(int(channels))), step(bench_style.draw([(1, 8, 4, 4)]))


def batch_hard_point(name: str, rows: int) -> tuple[Contender, Callable[[], Inputs], Callable[[], Record]]:
    found = bench_batch_hard.contenders(rows, torch.float32, "left out")
    contender = next(c for c in found if c.name == name)
    draw = partial(bench_batch_hard.draw, rows, DIMENSION, torch.float32)
    probe = f"{bench_batch_hard.__name__}:probe"
    return contender, draw, lambda: memory_record(contender, 0, probe, name, rows, DIMENSION)


def style_point(name: str, channels: int) -> tuple[Contender, Callable[[], Inputs], Callable[[], Record]]:
    contender = next(c for c in bench_style.contenders("left out") if c.name == name)
    memory = partial(memory_record, contender, 0, "benchmarks.scaling:style_probe", name, channels)
    return contender, partial(style_inputs, channels), memory


def points(op: str, names: tuple[str, ...], sizes: list[int], point: Callable) -> Iterator[Record]:
    """One record for every contender and size, up to the size at which a step takes too long."""
    for name in names:
        for size in tqdm(sizes, desc=f"{op}: {name}"):
            contender, draw, memory = point(name, size)
            record: Record = {"op": op, "contender": name, "size": size}
            if contender.skip:
                yield record | {"skipped": contender.skip}
                break
            first = run_once(contender, draw())["both"]  # warms up, unless it takes too long to go on
            runs = RUNS if first < LONGEST_STEP else 0
            seconds = [run_once(contender, draw())["both"] for _ in range(runs)] or [first]
            yield memory() | record | {"p50_ms": 1e3 * float(np.median(seconds))}
            if first > LONGEST_STEP:
                break


def plot(records: list[Record], unit: str, title: str, path: Path) -> None:
    """Time and memory over the size, each on logarithmic axes."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, key, factor, label in (
        (axes[0], "p50_ms", 1.0, "ms"),
        (axes[1], "peak_bytes", 2.0**-20, "MiB beyond the input"),
    ):
        for name in dict.fromkeys(r["contender"] for r in records):
            mine = [r for r in records if r["contender"] == name and r.get(key)]
            values = [r[key] * factor for r in mine]
            axis.plot([r["size"] for r in mine], values, marker="o", label=name, color=COLOURS[name])
        axis.set(xscale="log", yscale="log", xlabel=unit, ylabel=label)
        sizes = sorted({r["size"] for r in records})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8, rotation=30)
        axis.minorticks_off()
        values = [r[key] for r in records if r.get(key)]
        subs = (1, 2, 5) if max(values) < 1000 * min(values) else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


CURVES = {
    "batch_hard": (BATCH_HARD, ROWS, batch_hard_point, "rows N", f"Batch-hard triplet loss, D={DIMENSION}"),
    "style": (STYLE, CHANNELS, style_point, "channels C", f"Style loss, {SIDE}x{SIDE} positions"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--only", choices=CURVES, help="one curve instead of both")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args(arguments)
    where = environment()
    machine = f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}"
    for op in [options.only] if options.only else CURVES:
        names, sizes, point, unit, title = CURVES[op]
        records = list(points(op, names, sizes, point))
        result = {"environment": where, "records": records}
        (options.output / f"scaling_{op}.json").write_text(json.dumps(result, indent=1) + "\n")
        title = f"{title}, float32: forward + backward\n{machine}"
        plot(records, unit, title, options.output / f"scaling_{op}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
