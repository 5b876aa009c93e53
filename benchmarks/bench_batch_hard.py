"""Batch-hard triplet loss: N embeddings of dimension D, classes of four in random order.

Nominal work of forward, and of forward + backward, is the product of all pairs, 2 N^2 D FLOPs, for every
contender: who computes half of the symmetric product shows twice the rate. Backward needs O(N D) only and has
no rate. The yardstick is one `torch.mm(X, X.T)` of the same dtype, which also waits for its N^2 output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import deepsim_ext
from tests.samples import balanced_labels

from . import baselines
from .memory import memory_record
from .report import Bar
from .timing import (
    PRODUCT,
    Contender,
    Inputs,
    Record,
    add_rates,
    does_not_fit,
    fresh_leaves,
    measure,
    product_contender,
    run_once,
)

NAME = "batch_hard"
CASES = [(n, d, torch.float32) for d in (128, 512) for n in (256, 1024, 4096, 8192, 16384)]
CASES += [(4096, 128, torch.bfloat16), (4096, 128, torch.float16), (4096, 128, torch.float64)]
# From here on a step of the rivals that hold N x N matrices takes ten seconds.
LARGE = 16384
# One step with its memory, too long for percentiles.
LARGEST = (65536, 128)
QUICK_CASES = [(256, 128, torch.float32), (1024, 128, torch.float32)]
MEMORY_CASES = [(n, d) for d in (128, 512) for n in (4096, 8192)]
QUICK_MEMORY_CASES = [(1024, 128)]
# Largest ratio to one product that forward + backward may take, by rows and dimension.
RATIO_LIMITS = {(n, d): limit for d, limit in ((128, 0.4), (512, 0.5)) for n in (4096, 8192, 16384)}
RATIO_LIMITS |= {(256, 128): 2.0, (1024, 128): 1.0}
# Least share of the rate of one large product that forward reaches, where N >= 4096 and D >= 128.
RATE_LIMIT, LARGE_PRODUCT = 0.7, 4096


def case_name(n: int, d: int, dtype: torch.dtype = torch.float32) -> str:
    return f"N={n} D={d} {str(dtype).removeprefix('torch.')}"


def draw(n: int, d: int, dtype: torch.dtype) -> Inputs:
    """Normal embeddings: nearly every anchor is active, so nearly every one has a gradient."""
    return Inputs([torch.randn(n, d).to(dtype)], [balanced_labels(n, per_class=4)])


def _on_lists(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    return lambda leaves, constants: function(leaves[0], constants[0])


def contenders(n: int, dtype: torch.dtype, skip_compile: str = "") -> list[Contender]:
    """The contenders for N embeddings. Bytes per pair are those that the memory bench shows, rounded up."""
    slow = "takes ten seconds a step and more" if n >= LARGE else ""
    try:
        metric_learning, missing = baselines.pytorch_metric_learning_batch_hard(), ""
    except ImportError as error:
        metric_learning, missing = baselines.batch_hard_eager, str(error)
    compiled = torch.compile(baselines.batch_hard_eager, dynamic=False)
    matrices = slow or does_not_fit(6 * dtype.itemsize * n * n)
    return [
        product_contender(),
        Contender("deepsim_ext", _on_lists(deepsim_ext.batch_hard_triplet_loss), min_runs=9),
        Contender("torch eager", _on_lists(baselines.batch_hard_eager), min_runs=9, skip=matrices),
        Contender("torch.compile", _on_lists(compiled), skip=skip_compile or matrices),
        Contender("torch row-chunked", _on_lists(baselines.batch_hard_chunked)),
        Contender(
            "pytorch-metric-learning",
            _on_lists(metric_learning),
            skip=missing or slow or does_not_fit(40 * n * n),
        ),
    ]


EXACT = Contender("float64", _on_lists(baselines.batch_hard_chunked))


def probe(name: str, n: str, d: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One float32 forward + backward of the contender `name`, and a small one to warm up (see memory.py)."""
    contender = next(c for c in contenders(int(n), torch.float32) if c.name == name)

    def step(rows: int) -> Callable[[], object]:
        inputs = draw(rows, int(d), torch.float32)
        leaves = fresh_leaves(contender, inputs)
        return lambda: contender.function(leaves, inputs.constants).backward()

    # A new shape would start the compiler, which is no part of the call.
    return step(int(n)), step(int(n) if name == "torch.compile" else 64)


def time_case(n: int, d: int, dtype: torch.dtype, seconds: float, skip_compile: str) -> list[Record]:
    """One record per contender and phase."""
    torch.manual_seed(0)
    torch.compiler.reset()
    measured = measure(contenders(n, dtype, skip_compile), lambda: draw(n, d, dtype), EXACT, seconds=seconds)
    work = 2 * n * n * d
    add_rates(measured, {"forward": work, "both": work}, product=PRODUCT, baseline="torch eager")
    case = case_name(n, d, dtype)
    return [{"op": NAME, "kind": "time", "case": case} | record for record in measured]


def large_product() -> list[Record]:
    """The rate of one large product, the best of a few."""
    a = torch.randn(LARGE_PRODUCT, LARGE_PRODUCT)
    step = Contender(PRODUCT, lambda xs, _: torch.mm(xs[0], xs[0]), differentiable=False)
    best = min(run_once(step, Inputs([a], []))["forward"] for _ in range(5))
    case = f"{LARGE_PRODUCT} x {LARGE_PRODUCT} x {LARGE_PRODUCT}"
    gflops = 2 * LARGE_PRODUCT**3 / best / 1e9
    return [{"op": NAME, "kind": "peak", "case": case, "contender": step.name, "gflops": gflops}]


def largest_case() -> list[Record]:
    """One step of the largest batch, and its memory."""
    n, d = LARGEST
    ours = next(c for c in contenders(n, torch.float32, "left out") if c.name == "deepsim_ext")
    inputs = draw(n, d, torch.float32)
    seconds = min(run_once(ours, inputs)["both"] for _ in range(2))
    record = memory_record(ours, 2 * n * d * torch.float32.itemsize, f"{__name__}:probe", ours.name, n, d)
    return [{"op": NAME, "kind": "largest", "case": case_name(n, d), "both_ms": 1e3 * seconds} | record]


def memory_case(n: int, d: int, skip_compile: str) -> list[Record]:
    """One float32 record per contender; allowed are the gradient and one packed copy of the input.

    Only the smallest D is measured for all: the N x N matrices of the others do not depend on it.
    """
    allowed = 2 * n * d * torch.float32.itemsize
    return [
        {"op": NAME, "kind": "memory", "case": case_name(n, d)}
        | memory_record(contender, allowed, f"{__name__}:probe", contender.name, n, d)
        for contender in contenders(n, torch.float32, skip_compile)
        if contender.differentiable and (d == 128 or contender.name == "deepsim_ext")
    ]


def jobs(quick: bool) -> list[tuple[str, Callable[[], list[Record]]]]:
    """What there is to measure, each with its name."""
    seconds, skip_compile = (0.3, "left out by --quick") if quick else (1.0, "")
    times = [
        (case_name(*case), partial(time_case, *case, seconds, skip_compile))
        for case in (QUICK_CASES if quick else CASES)
    ]
    memory = [
        (f"memory {case_name(*case)}", partial(memory_case, *case, skip_compile))
        for case in (QUICK_MEMORY_CASES if quick else MEMORY_CASES)
    ]
    largest = (case_name(*LARGEST), largest_case)
    return [("one large product", large_product), *times, *memory, *([] if quick else [largest])]


def bars(records: list[Record]) -> list[Bar]:
    """What the project promises, with the measured figures."""
    ours = [r for r in records if r["contender"] == "deepsim_ext" and "skipped" not in r]
    valid = {(r["case"], r["phase"]): r for r in ours if r["kind"] == "time" and r["valid"]}
    memory = {r["case"]: r for r in ours if "beyond_bytes" in r}
    peak = next((r["gflops"] for r in records if r["kind"] == "peak"), None)
    result = []

    def figure(case: str, phase: str, key: str) -> float | None:
        return valid.get((case, phase), {}).get(key)

    for (n, d), limit in RATIO_LIMITS.items():
        case = case_name(n, d)
        text = f"batch-hard {case}, time over one {PRODUCT}"
        result.append(Bar(text, figure(case, "both", "product_ratio"), at_most=limit))
        if n < 4096:
            continue
        gflops = figure(case, "forward", "gflops")
        share = (
            None if gflops is None or peak is None else gflops / 2 / peak
        )  # nominal work: twice what is done
        text = f"batch-hard {case}, forward, share of the rate of one {LARGE_PRODUCT}^3 product"
        result.append(Bar(text, share, at_least=RATE_LIMIT))
    for n, d in [*MEMORY_CASES, LARGEST]:
        beyond = memory.get(case_name(n, d), {}).get("beyond_bytes")
        mebibytes = None if beyond is None else beyond / 2**20
        text = f"batch-hard {case_name(n, d)}, peak MiB beyond gradient and one packed copy"
        result.append(Bar(text, mebibytes, at_most=(64 * n + 2**25) / 2**20))
    for n, least in ((256, 5), (4096, 12)):
        text = f"batch-hard {case_name(n, 128)}, speed-up over torch eager"
        result.append(Bar(text, figure(case_name(n, 128), "both", "speedup"), at_least=least))
    single = figure(case_name(4096, 128), "both", "p50_ms")
    for dtype in (torch.bfloat16, torch.float16):
        case = case_name(4096, 128, dtype)
        half = figure(case, "both", "p50_ms")
        ratio = None if half is None or single is None else half / single
        result.append(Bar(f"batch-hard {case}, time over that of float32", ratio, at_most=1))
    largest = next((r["both_ms"] for r in ours if r["kind"] == "largest"), None)
    middle = figure(case_name(8192, 128), "both", "p50_ms")
    rate = None if largest is None or middle is None else (LARGEST[0] / 8192) ** 2 * middle / largest
    text = f"batch-hard {case_name(*LARGEST)}, pairs/s over those of N=8192"
    return [*result, Bar(text, rate, at_least=0.8)]
