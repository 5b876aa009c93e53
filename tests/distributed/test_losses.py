"""Losses over all ranks against one process with the union of the batches."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deepsim_ext import nn, reference
from deepsim_ext.distributed import DistributedLoss
from deepsim_ext.distributed._pairs import Pairs

from .ranks import run_ranks

WORLD_SIZES = (1, 2, 3, 4)
# Rows of each rank, of whom there may be fewer.
SIZES = {"even": (24, 24, 24, 24), "uneven": (31, 7, 1, 18), "empty": (0, 40, 0, 9), "none": (0, 0, 0, 0)}


class Case(NamedTuple):
    loss: nn.embeddings.BatchLoss
    data: str
    sizes: str
    dtype: torch.dtype


def losses(distance: str) -> list[nn.embeddings.BatchLoss]:
    stats = {"distance": distance, "return_stats": True}
    return [
        nn.BatchHardTripletLoss(margin=0.3, **stats),
        nn.BatchHardTripletLoss(soft=True, reduction="sum", **stats),
        nn.BatchHardTripletLoss(margin=0.1, reduction="mean_nonzero", **stats),
        nn.BatchContrastiveLoss(pos_margin=0.2, neg_margin=4.0 if distance != "cosine" else 0.9, **stats),
        nn.BatchContrastiveLoss(neg_margin=3.0, squared=True, reduction="mean", **stats),
        nn.BatchContrastiveLoss(neg_margin=2.0, reduction="sum", **stats),
        nn.BatchSemiHardTripletLoss(margin=0.3, **stats),
        nn.BatchSemiHardTripletLoss(margin=0.5, definition="tfa", reduction="sum", **stats),
        nn.BatchSemiHardTripletLoss(margin=0.4, definition="pml", reduction="mean_nonzero", **stats),
        nn.BatchAllTripletLoss(margin=0.3, **stats),
        nn.BatchSemiHardTripletLoss(soft=True, reduction="mean_nonzero", **stats),
        nn.BatchAllTripletLoss(margin=0.1, reduction="mean", **stats),
        nn.BatchHardTripletLoss(positive="easy", negative="semihard", **stats),
        nn.BatchAllTripletLoss(margin=0.2, reduction="sum", **stats),
        nn.BatchHardTripletLoss(positive="semihard", negative="easy", **stats),
        nn.BatchHardTripletLoss(positive="semihard", **stats),
    ]


DISTANCES = ("euclidean", "sqeuclidean", "cosine")
DATA = (
    "spread",
    "apart",
    "tight",
    "duplicates",
    "whole_numbers",
    "far",
    "zero_rows",
    "one_label",
    "singletons",
)
CASES = [
    *(Case(loss, "spread", "uneven", torch.float64) for d in DISTANCES for loss in losses(d)),
    *(Case(loss, "spread", "even", torch.float32) for d in DISTANCES for loss in losses(d)),
    *(Case(loss, data, "uneven", torch.float64) for data in DATA[1:] for loss in losses("euclidean")[::3]),
    *(Case(loss, "zero_rows", "even", torch.float64) for loss in losses("cosine")[::3]),
    *(Case(loss, "spread", sizes, torch.float64) for sizes in SIZES for loss in losses("euclidean")),
    *(
        Case(loss, "spread", "even", t)
        for t in (torch.bfloat16, torch.float16)
        for loss in losses("euclidean")
    ),
]


def draw(data: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The union of the batches."""
    random = torch.Generator().manual_seed(len(data) + rows)
    x = torch.randn(rows, 6, generator=random, dtype=torch.float64)
    labels = torch.randint(5, (rows,), generator=random)
    if data == "apart":  # classes far from each other, most negatives not active
        x += 5.0 * labels[:, None]
    if data == "tight":  # so near each other, for their length, that tiles lose the digits of their distances
        x = 1e-3 * x
        x[::2] += 1e3
    if data == "duplicates":
        x = x[torch.randint(1 + rows // 3, (rows,), generator=random)]
    if data == "whole_numbers":  # many equal distances
        x = torch.randint(3, (rows, 6), generator=random).double()
    if data == "far":
        x += 1e6
    if data == "zero_rows":
        x[::5] = 0
    if data == "one_label":
        labels[:] = 3
    if data == "singletons":
        labels = torch.arange(rows) - 7
    return x.to(dtype), labels


def tight_contrastive(case: Case) -> bool:
    """Whether the op of one process is itself as inexact as the ring: its tiles subtract centred rows."""
    return case.data == "tight" and isinstance(case.loss, nn.BatchContrastiveLoss)


def lost_by_centring(x: Tensor, labels: Tensor, margin: float) -> float:
    """The most that the rounding of centred rows can do to an entry of the gradient of a mean of negatives.

    Rounding moves each entry by half a unit in the last place of the longest, hence the vector between two
    rows by twice that times sqrt(D), and its direction by as much over their distance. Either ordered pair of
    two rows pulls with one over the number of active pairs.
    """
    moved = 2 * x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps / 2 * float(x.abs().max())
    d = (x[:, None] - x).norm(dim=2)
    active = (labels[:, None] != labels) & (d < margin)
    return float(2 * moved * torch.where(active, 1 / d, 0.0).sum(dim=1).max() / active.sum())


def offsets(sizes: tuple[int, ...]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def on_a_rank(rank: int, world_size: int, mode: str) -> list[tuple[Any, Tensor]]:
    """(result, gradient of this rank's rows) of every case."""
    results = []
    for case in CASES:
        ends = offsets(SIZES[case.sizes][:world_size])
        x, labels = draw(case.data, ends[-1], case.dtype)
        mine = slice(ends[rank], ends[rank + 1])
        x = x[mine].clone().requires_grad_()
        loss = DistributedLoss(case.loss, mode=mode, averaged_gradients=False)
        result = loss(x, labels[mine])
        result.loss.backward()
        results.append((result._replace(loss=result.loss.detach()), x.grad))
    return results


@pytest.fixture(scope="module", params=list(itertools.product(WORLD_SIZES, ("ring", "gather"))), ids=str)
def ranks(request: pytest.FixtureRequest) -> list[list[tuple[Any, Tensor]]]:
    world_size, mode = request.param
    return run_ranks(world_size, on_a_rank, world_size, mode)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Of the loss and, but for rounding to the dtype, its gradient."""
    return {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda k: "-".join(map(str, CASES[k][1:])) + f"-{k}"
)
def test_as_one_process(ranks: list[list[tuple[Any, Tensor]]], number: int) -> None:
    found = [results[number] for results in ranks]
    case = CASES[number]
    ends = offsets(SIZES[case.sizes][: len(found)])
    x, labels = draw(case.data, ends[-1], case.dtype)
    x.requires_grad_()
    expected = case.loss(x, labels)
    expected.loss.backward()
    for result, _ in found:
        for name, value, right in zip(expected._fields, result, expected, strict=True):
            assert value.dtype == right.dtype, name
            torch.testing.assert_close(value, right.detach(), **tolerance(case.dtype), msg=name)
            assert value.equal(getattr(found[0][0], name)), "not the same bits on all ranks"
    grad = torch.cat([grad for _, grad in found])
    assert grad.dtype == case.dtype
    # Entries of a sum of many terms are right to the rounding of the sum's largest.
    scale = float(x.grad.double().abs().amax().clamp(min=1)) if x.grad.numel() else 1.0
    half = case.dtype.itemsize == 2  # rounded at the end, perhaps the other way
    rounding = torch.finfo(case.dtype).eps * 2 if half else tolerance(case.dtype)["atol"]
    if tight_contrastive(case):
        rows = x.detach().clone().requires_grad_()
        reference.batch_contrastive_loss(rows, labels, **case.loss.options).loss.backward()
        lost = rounding + lost_by_centring(x.detach(), labels, case.loss.options["neg_margin"])
        torch.testing.assert_close(x.grad, rows.grad, rtol=0, atol=lost)
        torch.testing.assert_close(grad, rows.grad, rtol=0, atol=lost)
        return
    torch.testing.assert_close(grad, x.grad, rtol=0, atol=rounding * scale)


def one_wants_much(rank: int) -> tuple[Tensor, Tensor, bool]:
    """Rank 0 has positives among all other rows, more than it keeps; the others among its and their own."""
    x, _ = draw("spread", 32, torch.float64)
    labels = torch.cat([torch.arange(8), torch.arange(24) // 3])
    mine = slice(8 * rank, 8 * rank + 8)
    own = x[mine].clone().requires_grad_()
    loss = nn.BatchContrastiveLoss(reduction="sum")
    value = DistributedLoss(loss, mode="ring", averaged_gradients=False)(own, labels[mine])
    value.backward()
    kept: list[bool] = []
    known = Pairs._turns
    Pairs._turns = lambda pairs: kept.append(pairs.keeps) or known(pairs)
    DistributedLoss(loss, mode="ring")(own, labels[mine])
    right = x.clone().requires_grad_()
    loss(right, labels).backward()
    return own.grad, right.grad[mine], any(kept)


def test_rows_are_kept_on_all_ranks_or_on_none() -> None:
    for grad, right, kept in run_ranks(4, one_wants_much):
        assert not kept
        torch.testing.assert_close(grad, right, rtol=1e-12, atol=1e-12)
