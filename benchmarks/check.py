"""`python -m benchmarks.check`: have the losses become slower? Compares with the records in results/.

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

BASELINES = Path(__file__).parent / "results"
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


def recorded_ratios(result: Record) -> dict[str, float]:
    return {
        r["case"]: r["product_ratio"]
        for r in result["records"]
        if r["contender"] == "deepsim_ext" and r.get("phase") == "both"
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check", description=__doc__)
    parser.add_argument(
        "--baselines", type=Path, default=BASELINES, help="folder of benchmarks.run's records"
    )
    options = parser.parse_args(arguments)
    here, lost = environment(), 0
    for op in dict.fromkeys(op for op, _ in CASES):
        baseline = json.loads((options.baselines / f"cpu-{op}.json").read_text())
        different = [key for key in SAME if here[key] != baseline["environment"][key]]
        if different:
            there = ", ".join(
                f"{key} {baseline['environment'][key]!r}, here {here[key]!r}" for key in different
            )
            print(f"bench-check: the record of {op} is of another machine ({there}): `make bench`")
            return 2
        recorded = recorded_ratios(baseline)
        for case, measured in ((case, measured) for (o, case), measured in CASES.items() if o == op):
            lost += is_slower(f"{op} {case}", measured, recorded[case])
    return int(lost > 0)


def is_slower(name: str, measured: Callable[[], float], recorded: float) -> bool:
    """Measures until it is fast enough, or a few times, and says what was found."""
    limit, ratios = (1 + LOSS) * recorded, [measured()]
    while len(ratios) < ATTEMPTS and min(ratios) > limit:
        ratios.append(measured())
    slower = min(ratios) > limit
    found = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"{'SLOWER' if slower else 'ok':7}{name}: {found} of a product, recorded {recorded:.3f}")
    return slower


if __name__ == "__main__":
    raise SystemExit(main())
