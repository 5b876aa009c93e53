"""`python -m benchmarks.check`: have the losses become slower? Compares with the record in results/cpu.json.

What is compared are ratios to one product measured in the same run, never times. A ratio that is more than
15 % above the recorded one is measured again, up to three times in all: a loss of speed stays, a neighbour's
load does not. Exit code 1 for a loss, 2 where the record is of another kind of machine and says nothing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from . import bench_batch_hard, bench_style
from .environment import environment
from .timing import Record, add_rates, measure

BASELINE = Path(__file__).parent / "results" / "cpu.json"
SAME = ("cpu", "threads", "torch", "cpu_kernels", "omp_proc_bind")  # what makes ratios comparable
LOSS, ATTEMPTS, SECONDS = 0.15, 3, 1.0


def batch_hard(n: int, d: int) -> float:
    """Forward + backward over one product."""
    chosen = (bench_batch_hard.PRODUCT, "deepsim_ext")
    found = [c for c in bench_batch_hard.contenders(n, torch.float32, "left out") if c.name in chosen]
    draw = partial(bench_batch_hard.draw, n, d, torch.float32)
    return _ratio(measure(found, draw, bench_batch_hard.EXACT, seconds=SECONDS), bench_batch_hard.PRODUCT)


def style(size: int, layers: str) -> float:
    chosen = (bench_style.PRODUCT, "deepsim_ext")
    found = [c for c in bench_style.contenders("left out") if c.name in chosen]
    draw = partial(bench_style.draw, bench_style.shapes(size, layers))
    return _ratio(measure(found, draw, bench_style.EXACT, seconds=SECONDS), bench_style.PRODUCT)


def _ratio(records: list[Record], product: str) -> float:
    add_rates(records, {}, product=product, baseline=product)
    return next(
        r["product_ratio"] for r in records if r["contender"] == "deepsim_ext" and r["phase"] == "both"
    )


CASES: dict[tuple[str, str], Callable[[], float]] = {
    **{
        (bench_batch_hard.NAME, bench_batch_hard.case_name(n, d)): partial(batch_hard, n, d)
        for n, d in ((1024, 128), (4096, 128), (4096, 512))
    },
    **{
        (bench_style.NAME, bench_style.case_name(256, layers)): partial(style, 256, layers)
        for layers in ("conv1_1", "conv4_1", bench_style.ALL)
    },
}


def recorded_ratios(result: Record) -> dict[tuple[str, str], float]:
    return {
        (r["op"], r["case"]): r["product_ratio"]
        for r in result["records"]
        if r["contender"] == "deepsim_ext" and r.get("phase") == "both"
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="a record of benchmarks.run")
    options = parser.parse_args(arguments)
    baseline = json.loads(options.baseline.read_text())
    here = environment()
    different = [key for key in SAME if here[key] != baseline["environment"][key]]
    if different:
        there = ", ".join(f"{key} {baseline['environment'][key]!r}, here {here[key]!r}" for key in different)
        print(f"bench-check: the record is of another machine ({there}); make one here with `make bench`")
        return 2
    recorded, lost = recorded_ratios(baseline), 0
    for (op, case), measured in CASES.items():
        limit = (1 + LOSS) * recorded[op, case]
        ratios: list[float] = []
        while len(ratios) < ATTEMPTS and (not ratios or min(ratios) > limit):
            ratios.append(measured())
        slower = min(ratios) > limit
        lost += slower
        found = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        verdict = "SLOWER" if slower else "ok"
        print(f"{verdict:7}{op} {case}: {found} of a product, recorded {recorded[op, case]:.3f}")
    return int(lost > 0)


if __name__ == "__main__":
    raise SystemExit(main())
