"""DistributedLoss and cached_backward inside what people train with, on two ranks: the gradients of the
parameters after one step are those of one process with the union of the batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from deepsim_ext import cached_backward, nn
from deepsim_ext.distributed import DistributedLoss

from .ranks import run_ranks

SIZES = (10, 7)  # rows of each rank
WIDTH, D = 6, 4
LOSS = nn.BatchHardTripletLoss(margin=1.0)
Gradients = list[Tensor]
compiled = partial(torch.compile, backend="aot_eager")  # what is traced counts, not what inductor makes of it


def network(*between: Module, dtype: torch.dtype = torch.float64) -> Module:
    """The same on all ranks."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(WIDTH, 16), *between, torch.nn.Tanh(), torch.nn.Linear(16, D))
    return torch.nn.Sequential(*layers).to(dtype)


def batch(rank: int | None, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Of a rank or, for None, the union."""
    x = torch.randn(sum(SIZES), WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = slice(None) if rank is None else slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    return x.to(dtype)[rows], (torch.arange(len(x)) % 5)[rows]


def gradients(model: Module) -> Gradients:
    grads = [parameter.grad for parameter in model.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads]


def sharded(model: Module) -> Module:
    mesh = init_device_mesh("cpu", (len(SIZES),))
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


# ---- one step in one forward -------------------------------------------------------------------------------


def step(rank: int, model: Module) -> Gradients:
    x, labels = batch(rank)
    DistributedLoss(LOSS)(model(x), labels).backward()
    return gradients(model)


def ddp(rank: int) -> Gradients:
    return step(rank, DistributedDataParallel(network()))


def fsdp(rank: int) -> Gradients:
    return step(rank, sharded(network()))


def compiled_model(rank: int) -> Gradients:
    return step(rank, DistributedDataParallel(compiled(network())))


def compiled_ddp(rank: int) -> Gradients:
    return step(rank, compiled(DistributedDataParallel(network())))


def compiled_with_the_loss(rank: int) -> Gradients:
    """In one function, whose graph breaks at the loss."""
    model, loss = DistributedDataParallel(network()), DistributedLoss(LOSS)
    x, labels = batch(rank)
    compiled(lambda x, labels: loss(model(x), labels))(x, labels).backward()
    return gradients(model)


# ---- gradient accumulation ---------------------------------------------------------------------------------


def accumulated_ddp(rank: int) -> Gradients:
    model, loss = DistributedDataParallel(network()), DistributedLoss(LOSS)
    (x, labels), (y, _) = batch(rank), batch(rank, seed=2)
    with model.no_sync():
        loss(model(x), labels).backward()
    loss(model(y), labels).backward()
    return gradients(model)


def accumulated_fsdp(rank: int) -> Gradients:
    model, loss = sharded(network()), DistributedLoss(LOSS)
    (x, labels), (y, _) = batch(rank), batch(rank, seed=2)
    model.set_requires_gradient_sync(False)
    loss(model(x), labels).backward()
    model.set_requires_gradient_sync(True)
    loss(model(y), labels).backward()
    return gradients(model)


# ---- cached_backward ---------------------------------------------------------------------------------------


def in_chunks(rank: int, model: Module, sizes: list[int] | int = 4) -> Gradients:
    x, labels = batch(rank)
    loss = DistributedLoss(LOSS)
    cached_backward(model, list(x.split(sizes)), lambda embeddings: loss(embeddings, labels))
    return gradients(model)


def cached_ddp(rank: int) -> Gradients:
    """Three chunks on one rank and two on the other; each bucket of gradients is reduced once."""
    model = DistributedDataParallel(network())
    reduced = []

    def hook(group, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(group, bucket)

    model.register_comm_hook(None, hook)
    grads = in_chunks(rank, model)
    assert len(reduced) == len(set(reduced)) >= 1
    return grads


def cached_ddp_one_chunk(rank: int) -> Gradients:
    return in_chunks(rank, DistributedDataParallel(network()), sizes=100)


def cached_ddp_inside(rank: int) -> Gradients:
    """DistributedDataParallel somewhere in the model."""
    return in_chunks(rank, torch.nn.Sequential(DistributedDataParallel(network()), torch.nn.Identity()))


def cached_ddp_accumulated(rank: int) -> Gradients:
    """In no_sync nothing is reduced; the next call does it."""
    model, loss = DistributedDataParallel(network()), DistributedLoss(LOSS)
    (x, labels), (y, _) = batch(rank), batch(rank, seed=2)
    with model.no_sync():
        cached_backward(model, x, lambda e: loss(e, labels), chunk_size=4)
    first = gradients(model)[0]
    assert not torch.equal(*(other for other in gather(first)))
    cached_backward(model, y, lambda e: loss(e, labels), chunk_size=4)
    return gradients(model)


def cached_fsdp(rank: int) -> Gradients:
    """As many chunks on both ranks."""
    return in_chunks(rank, sharded(network()), sizes=[5, 3, 2] if rank == 0 else [2, 2, 3])


def cached_compiled(rank: int) -> Gradients:
    return in_chunks(rank, DistributedDataParallel(compiled(network())))


def gather(x: Tensor) -> list[Tensor]:
    found = [torch.empty_like(x) for _ in SIZES]
    dist.all_gather(found, x)
    return found


STEPS = [ddp, fsdp, compiled_model, compiled_ddp, compiled_with_the_loss]
STEPS += [cached_ddp, cached_ddp_one_chunk, cached_ddp_inside, cached_fsdp, cached_compiled]
ACCUMULATED = [accumulated_ddp, accumulated_fsdp, cached_ddp_accumulated]


# ---- autocast ----------------------------------------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)


def autocast(rank: int, dtype: torch.dtype, chunk_size: int | None) -> Gradients:
    x, labels = batch(rank, torch.float32)
    model, loss = DistributedDataParallel(network(dtype=torch.float32)), DistributedLoss(LOSS)
    with torch.autocast("cpu", dtype=dtype):
        if chunk_size is None:
            value = loss(model(x), labels)
        else:
            cached_backward(model, x, lambda e: loss(e, labels), chunk_size=chunk_size)
    if chunk_size is None:
        value.backward()
    return gradients(model)


AUTOCASTS = [partial(autocast, dtype=dtype, chunk_size=size) for dtype in HALVES for size in (None, 4)]


# ---- buffers -----------------------------------------------------------------------------------------------


class Drifting(Module):
    """Its output depends on a buffer that every call changes, by the data of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.shift += x.detach().mean()
        return x + self.shift


def buffers(rank: int) -> tuple[Gradients, Gradients]:
    """Of two steps in chunks, and of the same two steps with all activations in memory: gradients, buffer."""
    found = []
    loss = DistributedLoss(LOSS)
    for cached in (True, False):
        model = DistributedDataParallel(network(Drifting()))
        for seed in (1, 2):
            x, labels = batch(rank, seed=seed)
            if cached:
                cached_backward(model, x, lambda e, labels=labels: loss(e, labels), chunk_size=4)
                continue
            *chunks, last = x.split(4)
            with model.no_sync():
                parts = [model(chunk) for chunk in chunks]
            loss(torch.cat([*parts, model(last)]), labels).backward()
        found.append([*gradients(model), *model.buffers()])
    return found[0], found[1]


# ---- all of them on one pair of ranks ----------------------------------------------------------------------


def everything(rank: int) -> list[Any]:
    return [case(rank) for case in (*STEPS, *ACCUMULATED, *AUTOCASTS, buffers)]


@pytest.fixture(scope="module")
def by_rank() -> list[list[Any]]:
    return run_ranks(len(SIZES), everything, timeout=120)


def relative(a: Gradients, b: Gradients) -> float:
    """Of all together: distances do not change with the last bias, whose gradient is rounding."""
    a, b = (torch.cat([x.flatten().double() for x in each]) for each in (a, b))
    return ((a - b).norm() / b.norm()).item()


def of_one_process(*seeds: int, dtype: torch.dtype | None = None) -> Gradients:
    model = network(dtype=torch.float32 if dtype else torch.float64)
    for seed in seeds:
        x, labels = batch(None, torch.float32 if dtype else torch.float64, seed)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = LOSS(model(x), labels)
        loss.backward()
    return gradients(model)


def name_of(case: Callable) -> str:
    if isinstance(case, partial):
        return "-".join(str(option).removeprefix("torch.") for option in case.keywords.values())
    return case.__name__


@pytest.mark.parametrize("case", [*STEPS, *ACCUMULATED], ids=name_of)
def test_gradients_are_those_of_one_process(case, by_rank):
    index = [*STEPS, *ACCUMULATED].index(case)
    expected = of_one_process(*((1, 2) if case in ACCUMULATED else (1,)))
    for found in by_rank:
        assert relative(found[index], expected) <= 1e-12


@pytest.mark.parametrize("case", AUTOCASTS, ids=name_of)
def test_under_autocast(case, by_rank):
    """To the rounding of half gradients, which are added up by rank and chunk."""
    index = len(STEPS) + len(ACCUMULATED) + AUTOCASTS.index(case)
    dtype = case.keywords["dtype"]
    for found in by_rank:
        assert relative(found[index], of_one_process(1, dtype=dtype)) <= torch.finfo(dtype).eps


def test_buffers_are_those_of_rank_0_at_each_step(by_rank):
    for found in by_rank:
        cached, whole = found[-1]
        assert relative(cached, whole) <= 1e-12
