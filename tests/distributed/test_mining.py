"""Mining over all ranks against one process with the union of the batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import deepsim_ext
from deepsim_ext.distributed import batch_hard_mine

from .ranks import run_ranks
from .test_losses import SIZES, draw, offsets

STRATEGIES = (
    ("hard", "hard"),
    ("easy", "hard"),
    ("hard", "semihard"),
    ("semihard", "hard"),
    ("easy", "easy"),
)
CASES = [
    *itertools.product(
        ("spread", "duplicates", "whole_numbers", "tight"), SIZES, STRATEGIES, [torch.float64]
    ),
    *itertools.product(("spread", "whole_numbers", "tight"), ["even"], STRATEGIES, [torch.float32]),
]


def on_a_rank(rank: int, world_size: int, mode: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for data, sizes, (positive, negative), dtype in CASES:
        ends = offsets(SIZES[sizes][:world_size])
        x, labels = draw(data, ends[-1], dtype)
        mine = slice(ends[rank], ends[rank + 1])
        found.append(batch_hard_mine(x[mine], labels[mine], positive=positive, negative=negative, mode=mode))
    return found


@pytest.mark.parametrize("mode", ["ring", "gather"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_as_one_process(world_size: int, mode: str) -> None:
    ranks = run_ranks(world_size, on_a_rank, world_size, mode)
    for case, *of_ranks in zip(CASES, *ranks, strict=True):
        data, sizes, (positive, negative), dtype = case
        x, labels = draw(data, offsets(SIZES[sizes][:world_size])[-1], dtype)
        expected = deepsim_ext.batch_hard_mine(x, labels, positive=positive, negative=negative)
        for part, right in zip(zip(*of_ranks, strict=True), expected, strict=True):
            assert torch.cat(part).equal(right), case


def large(rank: int, world_size: int) -> tuple[Tensor, ...]:
    """2,000 rows of float32, among whose negatives some are nearly as near as the nearest."""
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(2000) % 300
    mine = slice(2000 * rank // world_size, 2000 * (rank + 1) // world_size)
    return batch_hard_mine(x[mine], labels[mine], mode="ring")


def test_the_same_choice_for_any_number_of_ranks() -> None:
    alone, *others = (
        [torch.cat(part) for part in zip(*run_ranks(n, large, n), strict=True)] for n in (1, 2, 3, 4)
    )
    for other in others:
        for part, right in zip(other, alone, strict=True):
            assert part.equal(right)
