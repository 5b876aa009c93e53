"""The cost model of the ring: bytes as counted on real ranks, times in the relations that they must have."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deepsim_ext import nn
from deepsim_ext.distributed import DistributedLoss, _batches, batch_hard_mine
from deepsim_ext.distributed.cost_model import MACHINES, Problem, Sent, Time, flops, predict, sent

from .ranks import run_ranks

ROWS, DIM = 16, 6  # of each rank
NVLINK = MACHINES["h200-nvlink"]


def count_bytes(rank: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Bytes that this rank sends in a call, by purpose, and how many distinct rows it asks others for."""
    counted = dict.fromkeys(("labels", "ring", "chosen"), 0)
    exchange, swap, gather = dist.batch_isend_irecv, dist.all_to_all_single, _batches._all_gather

    def counted_exchange(operations: list[dist.P2POp]) -> list[dist.Work]:
        counted["ring"] += sum(op.tensor.nbytes for op in operations if op.op is dist.isend)
        return exchange(operations)

    def counted_swap(received: Tensor, given: Tensor, *splits: list[int], group: dist.ProcessGroup) -> None:
        if splits:  # without any it is the counts
            counted["chosen"] += sum(splits[1]) - splits[1][rank]
        swap(received, given, *splits, group=group)

    def counted_gather(gathered: Tensor, own: Tensor, group: dist.ProcessGroup) -> None:
        counted["labels"] += own.nbytes * (dist.get_world_size() - 1)
        gather(gathered, own, group=group)

    world = dist.get_world_size()
    random = torch.Generator().manual_seed(world)
    labels = (torch.randperm(ROWS * world, generator=random) // 4)[rank * ROWS : (rank + 1) * ROWS]
    x = torch.randn(ROWS * world, DIM, generator=random).to(dtype)[rank * ROWS : (rank + 1) * ROWS]
    _, positives, negatives = batch_hard_mine(x, labels, mode="ring")
    chosen = torch.cat([positives, negatives]).unique()
    criterion = DistributedLoss(nn.BatchHardTripletLoss(), mode="ring")
    dist.batch_isend_irecv, dist.all_to_all_single = counted_exchange, counted_swap
    _batches._all_gather = counted_gather
    criterion(x.requires_grad_(), labels)
    return counted, int((chosen // ROWS != rank).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bytes_are_those_that_ranks_send(ranks: int, dtype: torch.dtype) -> None:
    counted, elsewhere = zip(*run_ranks(ranks, count_bytes, dtype), strict=True)
    compute_bytes = 8 if dtype is torch.float64 else 4
    problem = Problem(ROWS * ranks, DIM, ranks, dtype.itemsize, compute_bytes)
    expected = sent(problem, sum(elsewhere) / ranks)
    mean = {name: sum(c[name] for c in counted) / ranks for name in counted[0]}
    assert mean["labels"] == expected.labels
    assert mean["ring"] == expected.blocks + expected.found
    assert mean["chosen"] == pytest.approx(expected.chosen, rel=1e-12)
    assert 0 < sum(elsewhere) / ranks <= 2 * ROWS * (ranks - 1), (
        "some rows are elsewhere, or this says little"
    )


def test_one_rank_sends_nothing() -> None:
    one = Problem(4096, 128, 1)
    assert sent(one) == Sent(0, 0, 0, 0, 0)
    assert flops(one) == 4096**2 * 128, "two FLOPs for each entry of half of the pairs"
    assert predict(one, NVLINK).exposed == 0


@pytest.mark.parametrize("ranks", [2, 3, 8, 31])
def test_twice_the_ranks_have_half_of_the_arithmetic_each(ranks: int) -> None:
    few, many = (Problem(2**20, 128, k) for k in (ranks, 2 * ranks))
    assert flops(few) == 2 * flops(many)
    assert predict(few, NVLINK).arithmetic == pytest.approx(2 * predict(many, NVLINK).arithmetic)
    assert predict(few, NVLINK).chosen_pairs == pytest.approx(2 * predict(many, NVLINK).chosen_pairs)
    assert 4 * flops(few) == flops(few._replace(rows=2**21))


def test_half_of_the_ring_is_half_of_all_rows_whatever_the_ranks() -> None:
    for ranks in (2, 8, 1024):
        assert sent(Problem(2**20, 128, ranks, 2)).blocks == 2**20 / 2 * 128 * 2
    assert sent(Problem(3 * 2**10, 128, 3)).blocks == 2**10 * 128 * 4


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 64])
def test_times_are_monotone(ranks: int, overlaps: bool) -> None:
    machine = NVLINK._replace(overlaps=overlaps, bandwidth=1e9)
    problem = Problem(2**17, 128, ranks)
    time = partial(predict, problem)
    usual = time(machine)
    for better in (
        machine._replace(rate=2 * machine.rate),
        machine._replace(bandwidth=2 * machine.bandwidth),
        machine._replace(latency=machine.latency / 2),
        machine._replace(chosen_rate=2 * machine.chosen_rate),
    ):
        assert time(better).total < usual.total
    for larger in (problem._replace(rows=2**18), problem._replace(dim=256), problem._replace(entry_bytes=8)):
        assert predict(larger, machine).total > usual.total


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 64])
def test_what_overlaps_is_not_exposed(ranks: int) -> None:
    problem = Problem(2**17, 128, ranks)
    in_turn, beside = (predict(problem, NVLINK._replace(overlaps=o)) for o in (False, True))
    assert in_turn.exposed == in_turn.transfer == beside.transfer
    assert beside.total == pytest.approx(beside.arithmetic + beside.chosen_pairs + beside.exposed)
    if ranks < 4:  # one step: nothing travels while it is worked on
        assert beside.exposed == pytest.approx(beside.transfer)
    else:
        assert beside.exposed < beside.transfer
    # Arithmetic of no time hides nothing; of all time, all but what nothing is worked on beside.
    instant = predict(problem, NVLINK._replace(rate=1e30))
    assert instant.exposed == pytest.approx(instant.transfer)
    slow = predict(problem, NVLINK._replace(rate=1.0))
    step = sent(problem).blocks / problem.steps / NVLINK.bandwidth + NVLINK.latency
    step += sent(problem).found / problem.steps / NVLINK.bandwidth + 2 * NVLINK.latency
    assert slow.exposed == pytest.approx(slow.transfer - (problem.steps - 1) * step)


def test_without_ends_only_arithmetic_is_left() -> None:
    ideal = NVLINK._replace(bandwidth=1e30, latency=1e-30, chosen_rate=1e30)
    found = predict(Problem(2**20, 128, 64), ideal)
    assert found == Time(
        *(pytest.approx(t, abs=1e-12) for t in (found.arithmetic, 0, 0, 0, found.arithmetic))
    )
