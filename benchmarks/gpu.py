"""`python -m benchmarks.gpu FOLDER`: the losses on a GPU beside torch eager, compiled and chunked.

Device time of forward, backward and both by CUDA events, medians over runs that rotate among several random
inputs, so that nothing is measured out of a cache that training would not find filled. Written after every
case to FOLDER/gpu.json and FOLDER/gpu.md; `--seconds` bounds the run, and what that leaves out is said.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import deepsim_ext
from deepsim_ext.pair_distances import pair_distances
from deepsim_ext.reference.distances import rowwise
from tests.samples import VGG19_LAYERS, balanced_labels

from . import baselines, bench_all_pairs, bench_given_rows
from .environment import environment

Record = dict[str, Any]

# Name, dtype, whether torch may use TF32.
PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
ROWS = (16384, 4096, 256, 1024, 65536)
DEPTHS = (128, 512, 64, 1024)
# For which torch.compile is waited for: it takes ten seconds and more for each.
COMPILED_ROWS = (4096, 16384)
COMPILED_DEPTHS = (128,)
COMPILED_PICTURES = (512,)
# Ways of mining (DEEPSIM_CUDA_MINING), and where one may overtake another.
WAYS = ("direct", "mma", "wgmma")
CROSSOVER = tuple((n, d) for n in (512, 1024, 2048, 4096) for d in (64, 128, 512))
PAIR_ROWS = (4096, 1024, 16384)
GIVEN_ROWS = (16384, 1024, 131072)
LISTED_PAIRS = (16384, 262144)  # of 4096 rows
NEIGHBORS = ((8192, 10), (65536, 10))  # rows, k
PICTURES = ((512, 1), (256, 1), (1024, 1), (512, 8), (2048, 1))
ROTATED = 4  # inputs
RUNS = 20
SECONDS_OF_RUNS = 0.3
# Bytes that contenders with N x N matrices need, in matrices.
MATRICES = 8


def device_times(functions: list[Callable[[], Any]]) -> list[float]:
    """Milliseconds on the device of runs of the functions in turn, after one run of each.

    Fewer than RUNS where one takes long.
    """
    for function in functions[:-1]:
        function()
    torch.cuda.synchronize()
    start = time.monotonic()
    functions[-1]()
    torch.cuda.synchronize()
    runs = max(5, min(RUNS, int(SECONDS_OF_RUNS / (time.monotonic() - start))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for i, (start, end) in enumerate(events):
        start.record()
        functions[i % len(functions)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def summary(times: list[float]) -> Record:
    p20, p50, p80 = (float(p) for p in np.percentile(times, (20, 50, 80)))
    return {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "runs": len(times)}


def measure(loss: Callable[..., Tensor], inputs: list[tuple[Any, ...]]) -> Iterator[Record]:
    """Forward, backward, both and peak memory of `loss(leaves, constants)`."""

    def both(leaves: list[Tensor], constants: list[Tensor]) -> None:
        torch.autograd.grad(loss(leaves, constants), leaves)

    with torch.no_grad():
        yield {"phase": "forward"} | summary(device_times([lambda i=i: loss(*i) for i in inputs]))
    losses = [loss(*i) for i in inputs]

    def backward(k: int) -> None:
        torch.autograd.grad(losses[k], inputs[k][0], retain_graph=True)

    yield {"phase": "backward"} | summary(device_times([lambda k=k: backward(k) for k in range(len(inputs))]))
    losses.clear()
    times = device_times([lambda i=i: both(*i) for i in inputs])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(*inputs[0])
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    yield {"phase": "both", "peak_mib": extra / 2**20} | summary(times)


def guarded(name: str, loss: Callable[..., Tensor], inputs: list[tuple[Any, ...]], skip: str) -> list[Record]:
    """Records of one contender, or one record that says why there are none."""
    if skip:
        return [{"contender": name, "skipped": skip}]
    try:
        return [{"contender": name} | record for record in measure(loss, inputs)]
    except Exception as error:  # whatever keeps a baseline from running is a result to report
        torch.cuda.empty_cache()
        return [{"contender": name, "skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"}]


def batch_hard_case(n: int, d: int, precision: str) -> list[Record]:
    dtype, _ = PRECISIONS[precision]
    inputs = [
        ([torch.randn(n, d, device="cuda").to(dtype).requires_grad_()], [balanced_labels(n, 4).cuda()])
        for _ in range(ROTATED)
    ]
    free = torch.cuda.mem_get_info()[0]
    skip = "N x N matrices do not fit" if MATRICES * n * n * max(4, dtype.itemsize) > free else ""
    one_matrix = "the product does not fit" if ROTATED * n * n * dtype.itemsize > free else ""
    torch.compiler.reset()
    compiled = torch.compile(baselines.batch_hard_eager, dynamic=False)
    contenders = [
        ("deepsim_ext", lambda x, c: deepsim_ext.batch_hard_triplet_loss(x[0], c[0]), ""),
        ("torch eager", lambda x, c: baselines.batch_hard_eager(x[0], c[0]), skip),
        (
            "torch.compile",
            lambda x, c: compiled(x[0], c[0]),
            skip or ("" if n in COMPILED_ROWS and d in COMPILED_DEPTHS else "not asked for"),
        ),
        ("torch row-chunked", lambda x, c: baselines.batch_hard_chunked(x[0], c[0]), ""),
    ]
    records = [r for name, loss, why in contenders for r in guarded(name, loss, inputs, why)]
    if not one_matrix:
        with torch.no_grad():
            times = device_times([lambda i=i: torch.mm(i[0][0], i[0][0].T) for i in inputs])
        records.append({"contender": "product", "phase": "forward"} | summary(times))
    return [{"op": "batch_hard", "case": f"N={n} D={d} {precision}"} | r for r in records]


def all_pairs_case(name: str, n: int, precision: str) -> list[Record]:
    """A loss over all triplets or pairs of rows of 128 columns."""
    dtype, _ = PRECISIONS[precision]
    d, per_class = bench_all_pairs.D, bench_all_pairs.K
    inputs = [
        (
            [torch.randn(n, d, device="cuda").to(dtype).requires_grad_()],
            [balanced_labels(n, per_class).cuda()],
        )
        for _ in range(ROTATED)
    ]
    eager = bench_all_pairs.EAGER[name]
    elements = n * n * (1 if name == "contrastive" else per_class)
    too_large = MATRICES * elements * 4 > torch.cuda.mem_get_info()[0]
    ours = bench_all_pairs.OURS[name]
    records = guarded("deepsim_ext", lambda x, c: ours(x[0], c[0]), inputs, "")
    records += guarded(
        "torch eager",
        lambda x, c: eager(x[0].float(), c[0]),
        inputs,
        "matrices do not fit" if too_large else "",
    )
    with torch.no_grad():
        times = device_times([lambda i=i: torch.mm(i[0][0], i[0][0].T) for i in inputs])
    records.append({"contender": "product", "phase": "forward"} | summary(times))
    return [{"op": name, "case": f"N={n} D={d} {precision}"} | r for r in records]


def given_rows_case(name: str, t: int, precision: str) -> list[Record]:
    """A loss of given triplets or pairs of rows of 128 columns."""
    ours, eager = bench_given_rows.LOSSES[name]
    inputs = []
    for _ in range(ROTATED):
        leaves, constants = bench_given_rows.draw(name, t)
        leaves = [x.cuda().to(PRECISIONS[precision][0]).requires_grad_() for x in leaves]
        inputs.append((leaves, [c.cuda() for c in constants]))
    torch.compiler.reset()
    compiled = torch.compile(eager, dynamic=False)
    records = guarded("deepsim_ext", lambda x, c: ours(*x, *c), inputs, "")
    records += guarded("torch eager", lambda x, c: eager(*x, *c), inputs, "")
    why = "" if (t, precision) == (GIVEN_ROWS[0], "float32") else "not asked for"
    records += guarded("torch.compile", lambda x, c: compiled(*x, *c), inputs, why)
    return [{"op": name, "case": f"T={t} D={bench_given_rows.D} {precision}"} | r for r in records]


def listed_pairs_case(t: int) -> list[Record]:
    """The sum of the distances of listed pairs of 4096 rows of 128 columns, float32."""
    inputs = [
        (
            [torch.randn(4096, 128, device="cuda").requires_grad_()],
            list(torch.randint(4096, (2, t), device="cuda")),
        )
        for _ in range(ROTATED)
    ]

    def ours(leaves: list[Tensor], indices: list[Tensor]) -> Tensor:
        return pair_distances(leaves[0], leaves[0], *indices).sum()

    def eager(leaves: list[Tensor], indices: list[Tensor]) -> Tensor:
        return rowwise(*(leaves[0][i] for i in indices), "euclidean").sum()

    records = guarded("deepsim_ext", ours, inputs, "") + guarded("torch eager", eager, inputs, "")
    return [{"op": "listed pairs", "case": f"T={t} N=4096 D=128 float32"} | r for r in records]


def neighbors_case(n: int, k: int, precision: str) -> list[Record]:
    inputs = [torch.randn(n, 128, device="cuda").to(PRECISIONS[precision][0]) for _ in range(ROTATED)]
    times = device_times([lambda x=x: deepsim_ext.nearest_neighbors(x, None, k) for x in inputs])
    records = [{"contender": "deepsim_ext", "phase": "both", "peak_mib": float("nan")} | summary(times)]
    if 2 * n * n * 4 < torch.cuda.mem_get_info()[0]:
        times = device_times([lambda x=x: torch.cdist(x.float(), x.float()).topk(k) for x in inputs])
        records.append({"contender": "torch eager", "phase": "both"} | summary(times))
    return [{"op": "neighbors", "case": f"N={n} D=128 k={k} {precision}"} | r for r in records]


def crossover_case(n: int, d: int, precision: str) -> list[Record]:
    """The ways of mining side by side, to choose among them by."""
    inputs = [
        (torch.randn(n, d, device="cuda").to(PRECISIONS[precision][0]), balanced_labels(n, 4).cuda())
        for _ in range(ROTATED)
    ]
    records = []
    for way in WAYS:
        os.environ["DEEPSIM_CUDA_MINING"] = way
        try:
            times = device_times([lambda i=i: deepsim_ext.batch_hard_triplet_loss(*i) for i in inputs])
            records.append({"contender": way, "phase": "forward"} | summary(times))
        except ValueError as error:  # a GPU without wgmma
            records.append({"contender": way, "skipped": str(error)})
        finally:
            del os.environ["DEEPSIM_CUDA_MINING"]
    return [{"op": "mining", "case": f"N={n} D={d} {precision}"} | r for r in records]


def style_case(side: int, batch: int, precision: str) -> list[Record]:
    dtype, _ = PRECISIONS[precision]
    inputs = []
    for _ in range(2):
        features = [
            torch.randn(batch, c, side // f, side // f, device="cuda").relu().to(dtype).requires_grad_()
            for c, f in VGG19_LAYERS.values()
        ]
        targets = [torch.randn(1, f.shape[1], f.shape[1], device="cuda") * 1e-3 for f in features]
        inputs.append((features, targets))
    torch.compiler.reset()
    compiled = torch.compile(baselines.style_eager, dynamic=False)
    as_features = [(f, [t.to(dtype) for t in ts]) for f, ts in inputs]
    records = guarded("deepsim_ext", deepsim_ext.style_loss, inputs, "")
    records += guarded("torch eager", baselines.style_eager, as_features, "")
    why = "" if side in COMPILED_PICTURES else "not asked for"
    records += guarded("torch.compile", compiled, as_features, why)
    return [{"op": "style", "case": f"{side}x{side} batch {batch} {precision}"} | r for r in records]


def ceilings() -> list[Record]:
    """What this machine's products and copies reach."""
    records = []
    for precision, (dtype, tf32) in PRECISIONS.items():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        pairs = [torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2)]
        p50 = summary(device_times([lambda: torch.mm(*pairs)]))["p50_ms"]  # noqa: B023
        records.append({"op": "ceiling", "case": f"product {precision}", "tflops": 2 * 8192**3 / p50 / 1e9})
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    p50 = summary(device_times([lambda: target.copy_(source)]))["p50_ms"]
    records.append({"op": "ceiling", "case": "copy", "gb_per_s": 2 * 2**30 / p50 / 1e6})
    return records


def cases() -> list[tuple[str, Callable[[], list[Record]]]]:
    """Everything there is to measure, what matters most first."""
    styles = [(p, lambda s=s, b=b, p=p: style_case(s, b, p)) for s, b in PICTURES for p in PRECISIONS]
    batches = [
        (p, lambda n=n, d=d, p=p: batch_hard_case(n, d, p)) for d in DEPTHS for p in PRECISIONS for n in ROWS
    ]
    crossovers = [
        (p, lambda n=n, d=d, p=p: crossover_case(n, d, p))
        for n, d in CROSSOVER
        for p in ("float32", "bfloat16")
    ]
    pairs = [
        (p, lambda name=name, n=n, p=p: all_pairs_case(name, n, p))
        for n in PAIR_ROWS
        for p in ("float32", "bfloat16")
        for name in bench_all_pairs.OURS
    ]
    pairs += [("float32", lambda n=n, k=k: neighbors_case(n, k, "float32")) for n, k in NEIGHBORS]
    given = [
        (p, lambda name=name, t=t, p=p: given_rows_case(name, t, p))
        for t in GIVEN_ROWS
        for p in ("float32", "bfloat16")
        for name in bench_given_rows.LOSSES
    ]
    given += [("float32", lambda t=t: listed_pairs_case(t)) for t in LISTED_PAIRS]
    # In turn, so that whatever time allows has some of each.
    groups = itertools.zip_longest(batches, styles, pairs, given, crossovers)
    return [case for group in groups for case in group if case is not None]


def table(records: list[Record]) -> str:
    """Forward + backward of each case, side by side."""
    lines = ["| case | ms | mm | × eager | × compiled | × chunked | MiB |", "| --- |" + " ---: |" * 6]
    by_case: dict[str, dict[tuple[str, str], Record]] = {}
    for r in records:
        by_case.setdefault(f"{r['op']} {r['case']}", {})[r.get("contender", ""), r.get("phase", "")] = r
    for case, found in by_case.items():
        if case.startswith("mining "):
            continue
        ours = found.get(("deepsim_ext", "both"))
        if ours is None:
            single = found.get(("", ""), found.get(("deepsim_ext", ""), {}))
            what = single.get("skipped") or f"{single.get('tflops', single.get('gb_per_s', 0)):.0f}"
            lines.append(f"| {case} | {what} | | | | | |")
            continue
        own = ours["p50_ms"]

        def ratio(name: str, phase: str = "both", found: Any = found, own: float = own) -> str:
            other = found.get((name, phase))
            if other is None:
                return "–"
            return f"{own / other['p50_ms']:.2f}" if name == "product" else f"{other['p50_ms'] / own:.1f}"

        cells = [
            ratio("product", "forward"),
            *map(ratio, ("torch eager", "torch.compile", "torch row-chunked")),
        ]
        lines.append(f"| {case} | {own:.3f} | {' | '.join(cells)} | {ours['peak_mib']:.0f} |")
    return "\n".join(lines)


def crossover_table(records: list[Record]) -> str:
    """Forward by each way of mining, in milliseconds."""
    lines = [f"| forward, ms | {' | '.join(WAYS)} |", "| --- |" + " ---: |" * len(WAYS)]
    for _, group in itertools.groupby((r for r in records if r["op"] == "mining"), lambda r: r["case"]):
        found = list(group)
        cells = [f"{r['p50_ms']:.3f}" if "p50_ms" in r else "–" for r in found]
        lines.append(f"| {found[0]['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(records: list[Record]) -> str:
    return f"{table(records)}\n\n{crossover_table(records)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no GPU")
        return 2
    options.folder.mkdir(parents=True, exist_ok=True)
    where = environment() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    deadline = time.monotonic() + options.seconds
    records, left = ceilings(), 0
    for precision, case in cases():
        if time.monotonic() > deadline:
            left += 1
            continue
        torch.backends.cuda.matmul.allow_tf32 = PRECISIONS[precision][1]
        records += case()
        torch.cuda.empty_cache()
        result = {"environment": where, "records": records}
        (options.folder / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.folder / "gpu.md").write_text(f"{where}\n\n{tables(records)}\n")
    print(tables(records))
    print(f"{left} cases left out for lack of time" if left else "all cases measured")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
