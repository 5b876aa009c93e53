"""Times several contenders in one interleaved loop, so that drift of the machine hits all of them alike."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Largest accepted relative error (value, gradient) against float64. The gradient's allowance covers a few
# anchors whose best and runner-up lie within rounding, so that another, equally right pair is chosen.
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 0.05),
    torch.bfloat16: (1e-2, 0.05),
    torch.float16: (1e-2, 0.05),
}

Record = dict[str, Any]


class Inputs(NamedTuple):
    """`leaves` take part in the gradient, `constants` (labels, targets) don't."""

    leaves: list[Tensor]
    constants: list[Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute the same loss.

    function: `(leaves, constants) -> scalar loss`, or any result if not `differentiable` (a plain product).
    min_runs: timed runs, however slow it is.
    skip: why it is not run; it is then recorded as skipped for that reason.
    """

    name: str
    function: Callable[[list[Tensor], list[Tensor]], Tensor]
    differentiable: bool = True
    min_runs: int = 5
    skip: str = ""


PRODUCT = "torch.mm(X, X.T)"


def product() -> Callable[[Tensor], Tensor]:
    """The yardstick, into the output of the call before: page faults of a fresh one cost as much again, or
    nothing, as the allocator's past has it.
    """
    kept = []

    def run(x: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.mm(x, x.T))
        return torch.mm(x, x.T, out=kept[0])

    return run


def product_contender() -> Contender:
    run = product()
    return Contender(PRODUCT, lambda xs, _: run(xs[0].detach()), differentiable=False, min_runs=9)


def does_not_fit(required: float) -> str:
    """The reason to skip a contender that needs about `required` bytes, empty if they are available."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if required < 0.8 * available:
        return ""
    return f"needs about {required / 2**30:.1f} GiB, {available / 2**30:.1f} GiB available"


def fresh_leaves(contender: Contender, inputs: Inputs) -> list[Tensor]:
    """Copies of the leaves without a gradient: every run allocates its own."""
    return [leaf.clone().requires_grad_(contender.differentiable) for leaf in inputs.leaves]


def run_once(
    contender: Contender, inputs: Inputs, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of forward, backward and both, from one training step on fresh leaves.

    Backward is what follows the forward pass: it includes the allocation of the gradient and the freeing of
    everything that forward saved. A contender that is not differentiable has a forward time only, which
    includes the freeing of its result.
    """
    leaves = fresh_leaves(contender, inputs)
    start = clock()
    output = contender.function(leaves, inputs.constants)
    if not contender.differentiable:
        del output
        return {"forward": clock() - start}
    middle = clock()
    output.backward()
    del output
    end = clock()
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def value_and_gradients(contender: Contender, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradient of every leaf, in float64."""
    leaves = fresh_leaves(contender, inputs)
    loss = contender.function(leaves, inputs.constants)
    loss.backward()
    return loss.detach().double(), [leaf.grad.double() for leaf in leaves]


def relative_errors(
    actual: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]
) -> tuple[float, float]:
    """|v - v'| / |v'| of the value and the largest ||g - g'|| / ||g'|| over the leaves' gradients."""
    value = (actual[0] - expected[0]).abs() / expected[0].abs()
    gradients = [(a - e).norm() / e.norm() for a, e in zip(actual[1], expected[1], strict=True)]
    return float(value), float(max(gradients))


def takes_part(round_index: int, runs: int, rounds: int) -> bool:
    """Whether a contender with `runs` of `rounds` runs in this round; the runs are spread evenly."""
    return (round_index + 1) * runs // rounds > round_index * runs // rounds


def measure(
    contenders: Sequence[Contender],
    sample: Callable[[], Inputs],
    exact: Contender,
    *,
    seconds: float = 3.0,
    max_runs: int = 50,
    limit: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Checks every contender against `exact` in float64, warms it up, then times all of them in turn.

    sample: draws fresh random inputs; every round has its own, the same for all contenders.
    seconds: time for each contender, which gives between its `min_runs` and `max_runs` runs.
    limit: a contender whose second step (the first one may compile) takes longer, in seconds, is skipped.

    Returns one record per contender and phase with p20/p50/p80 in milliseconds, the number of runs and the
    errors, or one record with the reason in "skipped". "valid" says whether both errors are within TOLERANCE.
    """
    inputs = sample()
    tolerance = TOLERANCE[inputs.leaves[0].dtype]
    in_double = Inputs(*([t.double() if t.is_floating_point() else t for t in part] for part in inputs))
    expected = value_and_gradients(exact, in_double)
    del in_double

    records: dict[str, Record] = {}
    runs: dict[str, int] = {}
    for contender in contenders:
        record: Record = {"contender": contender.name}
        records[contender.name] = record
        if contender.skip:
            record["skipped"] = contender.skip
            continue
        try:
            if contender.differentiable:
                errors = relative_errors(value_and_gradients(contender, inputs), expected)
                # JSON has no NaN; no comparison with NaN is true.
                finite = (error if error < math.inf else None for error in errors)
                record["value_error"], record["gradient_error"] = finite
                record["valid"] = all(e <= t for e, t in zip(errors, tolerance, strict=True))
            else:
                run_once(contender, inputs, clock)
            step = max(run_once(contender, inputs, clock).values())
        except Exception as error:  # whatever keeps a baseline from running is a result to report
            record["skipped"] = f"failed with {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if step > limit:
            record["skipped"] = f"one step takes {step:.0f} s, the limit is {limit:.0f} s"
            continue
        runs[contender.name] = min(max(int(seconds / max(step, 1e-9)), contender.min_runs), max_runs)

    rounds = max(runs.values(), default=0)
    times: dict[tuple[str, str], list[float]] = {}
    for round_index in range(rounds):
        inputs = sample()
        # To and fro, so that no contender always follows the same one.
        for contender in contenders[:: 1 if round_index % 2 == 0 else -1]:
            if takes_part(round_index, runs.get(contender.name, 0), rounds):
                for phase, elapsed in run_once(contender, inputs, clock).items():
                    times.setdefault((contender.name, phase), []).append(elapsed)

    return [
        result
        for name, record in records.items()
        for result in (
            [record]
            if "skipped" in record
            else [record | {"phase": p} | summary(t) for (n, p), t in times.items() if n == name]
        )
    ]


def summary(times: Sequence[float]) -> Record:
    """Number of runs and percentiles in milliseconds of times in seconds."""
    p20, p50, p80 = (1e3 * float(p) for p in np.percentile(times, (20, 50, 80)))
    return {"runs": len(times), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def add_rates(records: list[Record], flops: dict[str, int], *, product: str, baseline: str) -> None:
    """Adds GFLOP/s, the ratio to the forward time of `product` and the speed-up over `baseline` by phase."""
    p50 = {(r["contender"], r["phase"]): r["p50_ms"] for r in records if "p50_ms" in r}
    for record in records:
        if "p50_ms" not in record:
            continue
        phase, own = record["phase"], record["p50_ms"]
        if phase in flops:
            record["gflops"] = flops[phase] / own / 1e6
        if (product, "forward") in p50:
            record["product_ratio"] = own / p50[product, "forward"]
        if (baseline, phase) in p50 and record["contender"] != product:
            record["speedup"] = p50[baseline, phase] / own
