"""DistributedLoss of a CrossBatchMemory against one process with the union of the batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deepsim_ext import nn
from deepsim_ext.distributed import DistributedLoss

from .ranks import run_ranks

D = 5
SEMI_HARD = nn.BatchSemiHardTripletLoss
CONTRASTIVE = {"neg_margin": 3.0, "pos_margin": 0.5}
LOSSES = {
    "hard-mean": nn.BatchHardTripletLoss(margin=0.5),
    "hard-mean_nonzero": nn.BatchHardTripletLoss(margin=0.1, reduction="mean_nonzero"),
    "hard-sum": nn.BatchHardTripletLoss(soft=True, reduction="sum"),
    "hard-strategies": nn.BatchHardTripletLoss(positive="easy", negative="semihard", margin=0.5),
    "semi_hard-mean": SEMI_HARD(margin=0.5),
    "semi_hard-mean_nonzero": SEMI_HARD(margin=0.5, definition="pml", reduction="mean_nonzero"),
    "all-mean_nonzero": nn.BatchAllTripletLoss(margin=0.5),
    "all-mean": nn.BatchAllTripletLoss(margin=0.5, distance="cosine", reduction="mean"),
    "contrastive-mean_nonzero": nn.BatchContrastiveLoss(**CONTRASTIVE),
    "contrastive-cosine": nn.BatchContrastiveLoss(distance="cosine"),
    "contrastive-mean": nn.BatchContrastiveLoss(**CONTRASTIVE, squared=True, reduction="mean"),
    "contrastive-sum": nn.BatchContrastiveLoss(**CONTRASTIVE, reduction="sum"),
}
RING = ("contrastive-mean_nonzero", "contrastive-mean")  # others gather the batches
# Rows of each rank, step by step; the last one in eval mode.
SIZES = {2: [(8, 8), (11, 2), (0, 7), (9, 6), (5, 5)], 3: [(4, 7, 3), (0, 12, 1), (5, 5, 5), (20, 8, 3)]}
MEMORY_SIZES = (24, 10)  # wraps around; smaller than most unions
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


class Step(NamedTuple):
    loss: Tensor
    gradient: Tensor  # of this rank's rows
    memory: Tensor
    memory_labels: Tensor
    filled: int


def memory_of(name: str, dtype: torch.dtype, memory_size: int) -> nn.CrossBatchMemory:
    memory_dtype = torch.float32 if dtype is torch.bfloat16 else dtype
    return nn.CrossBatchMemory(LOSSES[name], D, memory_size, weight=0.7).to(memory_dtype)


def unions(dtype: torch.dtype, world_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(world_size)
    for sizes in SIZES[world_size]:
        x = torch.randn(sum(sizes), D, generator=random, dtype=torch.float64)
        yield x.to(dtype), torch.randint(4, (sum(sizes),), generator=random)


def steps(
    loss: torch.nn.Module, memory: nn.CrossBatchMemory, dtype: torch.dtype, world_size: int, rank: int | None
) -> list[Step]:
    """Of one rank or, for None, of one process."""
    found = []
    for sizes, (x, labels) in zip(SIZES[world_size], unions(dtype, world_size), strict=True):
        rows = slice(None) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        leaf = x[rows].clone().requires_grad_()
        loss.train(len(found) < len(SIZES[world_size]) - 1)
        value = loss(leaf, labels[rows])
        value.backward()
        kept = memory.memory.clone(), memory.memory_labels.clone(), memory.filled
        found.append(Step(value.detach(), leaf.grad, *kept))
    return found


CASES = [
    (name, dtype, memory_size)
    for name in LOSSES
    for dtype, memory_size in zip(TOLERANCES, (*MEMORY_SIZES, MEMORY_SIZES[0]), strict=True)
]


def all_cases(rank: int, world_size: int) -> list[list[Step]]:
    found = []
    for name, dtype, memory_size in CASES:
        memory = memory_of(name, dtype, memory_size)
        loss = DistributedLoss(memory, mode="ring" if name in RING else "auto")
        found.append(steps(loss, memory, dtype, world_size, rank))
    return found


@pytest.fixture(scope="module", params=SIZES)
def by_rank(request: pytest.FixtureRequest) -> list[list[list[Step]]]:
    return run_ranks(request.param, all_cases, request.param)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}-{case[2]}")
def test_is_that_of_one_process_with_all_batches(case, by_rank):
    name, dtype, memory_size = case
    memory, world_size = memory_of(*case), len(by_rank)
    tolerance = TOLERANCES[dtype]
    expected = steps(memory, memory, dtype, world_size, None)
    found = [ranks[CASES.index(case)] for ranks in by_rank]
    for t, want in enumerate(expected):
        got = [each[t] for each in found]
        gradient = torch.cat([step.gradient for step in got]) / world_size
        assert gradient.dtype == dtype
        assert (gradient - want.gradient).norm() <= tolerance * want.gradient.norm()
        for step in got:
            assert torch.equal(step.loss, got[0].loss)
            torch.testing.assert_close(step.loss, want.loss, rtol=min(tolerance, 1e-5), atol=0)
            assert torch.equal(step.memory, want.memory)
            assert torch.equal(step.memory_labels, want.memory_labels)
            assert step.filled == want.filled
    assert expected[-1].filled == expected[-2].filled == memory_size
    assert all(step.gradient.any() for step in expected[1:])


def test_without_ranks_it_is_the_memory_itself():
    memory, other = (memory_of("all-mean", torch.float64, 24) for _ in range(2))
    of_ranks = steps(DistributedLoss(other), other, torch.float64, 2, None)
    for a, b in zip(of_ranks, steps(memory, memory, torch.float64, 2, None), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True))


# ---- state and errors --------------------------------------------------------------------------------------


def error_of(loss: torch.nn.Module, x: Tensor, labels: Tensor) -> str | None:
    try:
        loss(x, labels)
    except (RuntimeError, TypeError, ValueError) as caught:
        return f"{type(caught).__name__}: {caught}"
    return None


def state_and_errors(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    x, labels = torch.randn(6, D, generator=torch.Generator().manual_seed(rank)), torch.arange(6) % 3
    memory = nn.CrossBatchMemory(LOSSES["hard-mean"], D, memory_size=16)
    loss = DistributedLoss(memory)
    loss(x, labels)
    found["keys"] = list(memory.state_dict()), list(loss.state_dict())
    restored = nn.CrossBatchMemory(LOSSES["hard-mean"], D, memory_size=16)
    restored.load_state_dict(memory.state_dict())
    found["restored"] = torch.equal(DistributedLoss(restored)(x, labels), copy.deepcopy(loss)(x, labels))
    unsummed = DistributedLoss(copy.deepcopy(memory), averaged_gradients=False)
    gradients = []
    for each in (copy.deepcopy(loss), unsummed):
        leaf = x.clone().requires_grad_()
        each(leaf, labels).backward()
        gradients.append(leaf.grad)
    found["averaged"] = torch.equal(gradients[0], 2 * gradients[1])
    before = copy.deepcopy(memory.state_dict())
    found["columns"] = error_of(loss, x[:, :3] if rank else x, labels)
    found["dtype"] = error_of(loss, x.double() if rank else x, labels)
    found["all_columns"] = error_of(loss, x[:, :3], labels)
    if rank:
        restored.reset()
    found["filled"] = error_of(DistributedLoss(restored), x, labels)
    after = memory.state_dict()
    found["unchanged"] = all(torch.equal(after[key], before[key]) for key in ("memory", "memory_labels"))
    return found


@pytest.fixture(scope="module")
def of_two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, state_and_errors)


def test_the_state_is_that_of_the_memory(of_two_ranks):
    keys = ["memory", "memory_labels", "_extra_state"]
    for found in of_two_ranks:
        assert found["keys"] == (keys, [f"loss.{key}" for key in keys])
        assert found["restored"]


def test_gradients_to_be_added_up(of_two_ranks):
    assert all(found["averaged"] for found in of_two_ranks)


def test_errors_come_on_all_ranks_and_leave_the_memory_as_it_was(of_two_ranks):
    first, second = of_two_ranks
    assert first["unchanged"] and second["unchanged"]
    columns = "embeddings must be of shape [N, D]=[N, 5], got float32 [6, 3]"
    dtype = "embeddings must be of a dtype that a float32 memory holds exactly, got float64 [6, 5]"
    for case, message in (("columns", f"ValueError: DistributedLoss: {columns}"),
                          ("dtype", f"TypeError: DistributedLoss: {dtype}")):  # fmt: skip
        assert second[case] == message
        assert first[case] == f"RuntimeError: DistributedLoss: rank 1 failed: {message}"
    assert first["all_columns"] == second["all_columns"] == f"ValueError: DistributedLoss: {columns}"
    for found in of_two_ranks:
        assert found["filled"].startswith(
            "ValueError: DistributedLoss: embeddings must be the same on all ranks"
        )
