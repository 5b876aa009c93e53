"""`profile-mining --simulate`: batch-hard over many ranks by the cost model, over local ones also timed.

The figures of local ranks are measured on two gloo processes that work at once, a thread each: the rate of
the tile kernel for two blocks that meet, what passes between the two, and chosen pairs of own rows. Where
there are more ranks than cores, they share the cores' rates and, since gloo's copies are done by the same
cores, the links'.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import multiprocessing

from .. import nn
from .._checks import compute_dtype
from ..batch_hard_extremes import batch_hard_extremes
from ..distributed import DistributedLoss
from ..distributed._batches import Batches, exchange
from ..distributed._pairs import Pairs
from ..distributed._ring import _exchange, _wait
from ..distributed.cost_model import MACHINES, Machine, Problem, flops, predict, sent

LOCAL = "local"
MOST_LOCAL_RANKS = 8
ROWS = 2048  # of each rank that figures are measured with
MESSAGE = 2**23  # bytes that the links' rate is measured with
PER_CLASS = 4
RUNS = 7
CALLS = 8  # in a row, so that beginning together takes next to none of the time


class Prediction(NamedTuple):
    problem: Problem
    machine: Machine
    measured: float | None = None  # seconds


# ---- local ranks -------------------------------------------------------------------------------------------


def on_local_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    """What function(*args) returns on rank 0 of a gloo group of so many processes, of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_enter, (ranks, folder, function, args), nprocs=ranks)
        return torch.load(Path(folder) / "result")


def _enter(rank: int, ranks: int, folder: str, function: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    result = function(*args)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()


def _seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Of a call, the median of runs, from when all ranks begin until all are through."""
    times = []
    for _ in range(RUNS + 1):  # the first one warms up
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        dist.barrier()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:])


def _draw(rows: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of `rows`."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
    random = torch.Generator().manual_seed(0)
    labels = torch.randperm(rows, generator=random)[mine] // PER_CLASS
    return torch.randn(rows, dim, generator=random)[mine].to(dtype), labels


def _figures(dim: int, dtype: torch.dtype) -> tuple[float, float, float, float]:
    """rate, bandwidth, latency and chosen_rate of a `Machine`."""
    x, labels = _draw(ROWS * dist.get_world_size(), dim, dtype)
    x, batches = exchange("simulate", dist.group.WORLD, "", lambda: (x, labels))
    center = torch.zeros(dim, dtype=torch.float64)
    ref = x.clone()
    tiles = _seconds(lambda: batch_hard_extremes(x, labels, ref, labels, center=center), CALLS)
    latency = _seconds(lambda: _pass_on(torch.empty(1), batches), CALLS)
    message = torch.empty(MESSAGE, dtype=torch.uint8)
    transfer = _seconds(lambda: _pass_on(message, batches), CALLS)
    pairs = _seconds(lambda: _measure_and_pull(x, batches), CALLS)
    return 2 * ROWS**2 * dim / tiles, MESSAGE / transfer, latency, 2 * ROWS * dim / pairs


def _pass_on(message: torch.Tensor, batches: Batches) -> None:
    _wait(_exchange(batches, message, batches.rank + 1, torch.empty_like(message), batches.rank - 1))


def _measure_and_pull(x: torch.Tensor, batches: Batches) -> None:
    mine = torch.arange(ROWS).repeat(2)
    others = torch.cat([torch.arange(ROWS).roll(1), torch.arange(ROWS).roll(2)]) + batches.offset
    pairs = Pairs(x, mine, others, batches)
    distances = pairs.distances("euclidean")
    pairs.pull(torch.ones_like(distances), distances, "euclidean")


def _step(rows: int, dim: int, dtype: torch.dtype) -> float:
    """Seconds of forward and backward."""
    x, labels = _draw(rows, dim, dtype)
    x.requires_grad_()
    criterion = DistributedLoss(nn.BatchHardTripletLoss(), mode="ring")
    return _seconds(lambda: torch.autograd.grad(criterion(x, labels), x))


def local_machine(dim: int, dtype: torch.dtype) -> Machine:
    """The figures of this machine, measured now."""
    figures = on_local_ranks(2, _figures, dim, dtype)
    return Machine(LOCAL, *figures, False, "measured on two gloo processes of one thread that work at once")


def shared(machine: Machine, ranks: int) -> Machine:
    """A local machine as each of so many ranks has it. Those that wait for messages wait side by side."""
    share = max(1.0, ranks / _cores()) / max(1.0, 2 / _cores())
    return machine._replace(
        rate=machine.rate / share,
        bandwidth=machine.bandwidth / share,
        chosen_rate=machine.chosen_rate / share,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the command -------------------------------------------------------------------------------------------


def simulate(
    rows: Sequence[int],
    dims: Sequence[int],
    dtypes: Sequence[str],
    ranks: Sequence[int],
    machine: str,
    overrides: dict[str, float],
) -> list[Prediction]:
    """Every combination, those of up to `MOST_LOCAL_RANKS` local ranks measured as well.

    overrides: `bandwidth`, `latency` or `rate` in place of the machine's. ValueError for ranks that would
    have no rows.
    """
    if min(rows) < max(ranks):
        raise ValueError(f"--ranks must be at most --rows, got {max(ranks)} ranks for {min(rows)} rows")
    found = []
    for dim in dims:
        for name in dtypes:
            dtype = getattr(torch, name)
            one = MACHINES[machine] if machine != LOCAL else local_machine(dim, dtype)
            compute_bytes = compute_dtype(torch.empty(0, dtype=dtype)).itemsize
            for n in rows:
                for r in ranks:
                    each = (shared(one, r) if machine == LOCAL else one)._replace(**overrides)
                    problem = Problem(n, dim, r, dtype.itemsize, compute_bytes)
                    is_run = machine == LOCAL and 1 < r <= MOST_LOCAL_RANKS
                    measured = on_local_ranks(r, _step, n, dim, dtype) if is_run else None
                    found.append(Prediction(problem, each, measured))
    return found


def report(predictions: Sequence[Prediction]) -> str:
    """Predictions as a Markdown table, below the figures that they assume."""
    lines = []
    for machine in dict.fromkeys(p.machine for p in predictions):
        lines += [
            f"{machine.name}, every rank: {machine.rate / 1e9:.4g} GFLOP/s of tiles,"
            f" {machine.bandwidth / 1e9:.3g} GB/s each way, {machine.latency * 1e6:.3g} us a message,"
            f" {machine.chosen_rate / 1e6:.4g} M entries/s of chosen pairs,"
            f" bytes travel {'beside' if machine.overlaps else 'in turn with'} the arithmetic."
        ]
    assumptions = dict.fromkeys(p.machine.assumptions for p in predictions)
    lines += [f"Assumed: {text}." for text in assumptions]
    lines += [
        "Assumed: rows are spread evenly, labels at random, no rank is late, no choice is made again; forward"
        " with gradient, batch-hard, mode ring.",
        "",
    ]
    head = ["ranks", "N", "D", "bytes/entry", "GFLOP/rank", "MB/link", "MB sent/rank", "arithmetic ms"]
    head += [
        "chosen ms",
        "transfer ms",
        "exposed ms",
        "predicted ms",
        "arithmetic of it",
        "measured ms",
        "measured/predicted",
    ]
    rows = [head, ["---:"] * len(head), *map(_row, predictions)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _row(prediction: Prediction) -> list[str]:
    problem, machine, measured = prediction
    time, bytes_sent = predict(problem, machine), sent(problem)
    milliseconds = [
        1e3 * t for t in (time.arithmetic, time.chosen_pairs, time.transfer, time.exposed, time.total)
    ]
    return [
        *map(str, (problem.ranks, problem.rows, problem.dim, problem.entry_bytes)),
        f"{flops(problem) / 1e9:.4g}",
        f"{(bytes_sent.blocks) / 1e6:.4g}",
        f"{bytes_sent.total / 1e6:.4g}",
        *(f"{t:.3g}" for t in milliseconds),
        f"{time.arithmetic / time.total:.0%}",
        *(["\u2013"] * 2 if measured is None else [f"{1e3 * measured:.3g}", f"{measured / time.total:.2f}"]),
    ]
