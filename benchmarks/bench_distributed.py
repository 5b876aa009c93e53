"""Batch-hard over the batches of two processes, a thread and a core each, against one process with all rows.

The same two processes take turns: one has the union of the batches and the other waits, or both have half of
it and the blocks go round the ring, or all rows are gathered. So all ways see the same machine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepsim_ext import nn
from deepsim_ext._memory import peak_of_call
from deepsim_ext.distributed import DistributedLoss

from .report import Bar
from .timing import Record, summary

NAME = "distributed"
RANKS, D, K = 2, 128, 4
SIZES, QUICK_SIZES = (1024, 2048, 4096, 16384), (256, 512)
ALONE, MODES = "one process", ("ring", "gather")
MIN_RUNS = 5
TIMEOUT = timedelta(minutes=2)  # for another rank; then its error is told


def case_name(rows: int) -> str:
    return f"batch_hard N={rows} D={D} on {RANKS} ranks"


def contender(mode: str) -> str:
    return f"{RANKS} ranks, {mode}"


def draw(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, generator=random), torch.randperm(rows, generator=random) // K


def step(criterion: Callable[..., torch.Tensor], x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The gradient of one forward and backward."""
    x = x.clone().requires_grad_()
    criterion(x, labels).backward()
    return x.grad


def on_a_rank(rank: int, rows: int, seconds: float) -> list[Record]:
    """Seconds of every way, by rank 0's clock, from when all begin until all are through; and peak memory."""
    loss = nn.BatchHardTripletLoss()
    ways = {contender(m): DistributedLoss(loss, mode=m, averaged_gradients=False) for m in MODES}
    mine = slice(rank * rows // RANKS, (rank + 1) * rows // RANKS)
    times: dict[str, list[float]] = {name: [] for name in (ALONE, *ways)}
    right, runs, enough = True, 0, False
    while not enough:
        x, labels = draw(rows, runs)
        for name in times:
            dist.barrier()
            start = time.perf_counter()
            if name != ALONE:
                grad = step(ways[name], x[mine], labels[mine])
            elif rank == 0:
                exact = grad = step(loss, x, labels)
            dist.barrier()
            if runs:  # the first one warms up
                times[name].append(time.perf_counter() - start)
            elif rank == 0:
                right &= bool(torch.allclose(grad, exact[: len(grad)], rtol=1e-4, atol=1e-6))
        runs += 1
        spent = torch.tensor(sum(times[ALONE]))
        dist.broadcast(spent, src=0)
        enough = runs > MIN_RUNS and spent > seconds
    block = len(x[mine]) * D * x.element_size()
    records = [
        {"kind": "time", "contender": name, "phase": "both", "valid": right} | summary(t)
        for name, t in times.items()
    ]
    for name, way in ways.items():
        small = x[mine][:64], labels[mine][:64]
        peak = peak_of_call(partial(step, way, x[mine], labels[mine]), partial(step, way, *small))
        peaks = [torch.zeros((), dtype=torch.int64) for _ in range(RANKS)]
        dist.all_gather(peaks, torch.tensor(peak))
        worst = int(max(peaks))
        # The gradient, and two blocks of others in flight.
        peaks = {"peak_bytes": worst, "beyond_bytes": max(worst - 3 * block, 0), "blocks": worst / block}
        records.append({"kind": "memory", "contender": name} | peaks)
    return records


def run(rank: int, folder: str, rows: int, seconds: float) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count()))  # OpenMP may have bound the parent to a core
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    rendezvous = f"file://{Path(folder) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    records = on_a_rank(rank, rows, seconds)
    if rank == 0:
        (Path(folder) / "records").write_bytes(pickle.dumps(records))
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def _unbound() -> Iterator[None]:
    """OpenMP in new processes stays off the first core, to which it would bind the threads of each."""
    kept = {name: os.environ.pop(name) for name in ("OMP_PROC_BIND", "OMP_PLACES") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def measure_case(rows: int, seconds: float) -> list[Record]:
    case: dict[str, Any] = {"op": NAME, "case": case_name(rows)}
    with tempfile.TemporaryDirectory() as folder, _unbound():
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=run, args=(rank, folder, rows, seconds)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        path = Path(folder) / "records"
        if not path.exists():
            codes = [process.exitcode for process in processes]
            return [case | {"contender": "deepsim_ext", "skipped": f"ranks ended with {codes}"}]
        return [case | record for record in pickle.loads(path.read_bytes())]


def jobs(quick: bool) -> list[tuple[str, Callable[[], list[Record]]]]:
    """What there is to measure, each with its name."""
    seconds = 0.1 if quick else 2.0
    return [(case_name(n), partial(measure_case, n, seconds)) for n in (QUICK_SIZES if quick else SIZES)]


def bars(records: list[Record]) -> list[Bar]:
    """What the project promises, with the measured figures."""
    case = case_name(SIZES[-1])
    here = [r for r in records if r["case"] == case and r.get("valid", True)]
    times = {r["contender"]: r["p50_ms"] for r in here if r["kind"] == "time"}
    alone, ring = times.get(ALONE), times.get(contender("ring"))
    blocks = {r["contender"]: r["blocks"] for r in here if r["kind"] == "memory"}
    return [
        Bar(f"{case}, time of the ring over one process", ring and alone and ring / alone, at_most=0.65),
        # Gradient, two blocks that meet and their packed copies, chosen rows and what goes back to them.
        Bar(f"{case}, peak of a rank in blocks of its own rows", blocks.get(contender("ring")), at_most=10),
    ]
