"""What one rank does wrong, or no longer does, is an error on all: named, and soon."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from deepsim_ext import nn
from deepsim_ext.distributed import DistributedLoss, batch_hard_mine

from .ranks import run_ranks

LOSS = nn.BatchHardTripletLoss()


def words_of_a_bad_rank(rank: int, mistake: str, mode: str) -> tuple[str, str, float]:
    """(kind, words) of the error on this rank, where rank 1 makes the mistake, and the loss after it."""
    x, labels = torch.randn(6, 4, requires_grad=True), torch.arange(6) % 2
    criterion = DistributedLoss(LOSS, mode=mode)
    bad, bad_labels, wrong = x, labels, criterion
    if rank == 1:
        bad, bad_labels, wrong = {
            "labels": (x, labels.float(), criterion),
            "rows": (x[:3], labels, criterion),
            "no tensor": ("rows", labels, criterion),
            "columns": (x[:, :3], labels, criterion),
            "dtype": (x.double(), labels, criterion),
            "margin": (x, labels, DistributedLoss(nn.BatchHardTripletLoss(margin=1.0), mode=mode)),
            "loss": (x, labels, DistributedLoss(nn.BatchAllTripletLoss(), mode=mode)),
            "mode": (x, labels, DistributedLoss(LOSS, mode="auto")),
        }[mistake]
    with pytest.raises(Exception, match=".") as caught:
        wrong(bad, bad_labels)
    return caught.type.__name__, str(caught.value), float(criterion(x, labels))


@pytest.mark.parametrize("mode", ["ring", "gather"])
@pytest.mark.parametrize(
    ("mistake", "kind", "words"),
    [
        ("labels", "TypeError", "labels must be int64 of shape [N]=[6], got float32 [6]"),
        ("rows", "ValueError", "labels must be int64 of shape [N]=[3], got int64 [6]"),
        ("no tensor", "TypeError", "embeddings must be"),
    ],
)
def test_bad_input_on_one_rank(mistake: str, kind: str, words: str, mode: str) -> None:
    others = run_ranks(3, words_of_a_bad_rank, mistake, mode)
    bad = others.pop(1)
    assert bad[0] == kind and f"DistributedLoss: {words}" in bad[1]
    for name, text, _ in others:
        assert name == "RuntimeError"
        assert text.startswith(f"DistributedLoss: rank 1 failed: {kind}: ") and words in text
    assert len({loss for *_, loss in (bad, *others)}) == 1, "and the next call is as good as any"


@pytest.mark.parametrize("mistake", ["columns", "dtype", "margin", "loss", "mode"])
def test_ranks_that_do_not_agree(mistake: str) -> None:
    for name, text, _ in run_ranks(3, words_of_a_bad_rank, mistake, "ring"):
        assert name == "ValueError"
        assert "must be the same on all ranks" in text and text.endswith("on rank 1")


def miner_against_loss(rank: int) -> str:
    x, labels = torch.randn(6, 4), torch.arange(6) % 2
    with pytest.raises(ValueError, match="the same on all ranks") as caught:
        DistributedLoss(LOSS)(x, labels) if rank == 0 else batch_hard_mine(x, labels)
    return str(caught.value)


def test_different_calls_on_two_ranks() -> None:
    names, words = zip(*(text.split(": ", 1) for text in run_ranks(2, miner_against_loss)), strict=True)
    assert names == ("DistributedLoss", "batch_hard_mine"), "each names the function that its rank called"
    assert words[0] == words[1]


def outlive(rank: int) -> float:
    """Seconds until this rank notices that rank 1 is gone."""
    criterion = DistributedLoss(LOSS, mode="ring")
    x, labels = torch.randn(64, 4), torch.arange(64) % 8
    criterion(x, labels)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        for _ in range(1000):
            criterion(x, labels)
    return time.monotonic() - start


def test_a_killed_rank_ends_the_others() -> None:
    with pytest.raises(AssertionError) as caught:
        run_ranks(3, outlive, timeout=30)
    assert str(caught.value) == "rank 1: ended with exit code -9", "and no other said that it hung"


def nan_on_one(rank: int, mode: str) -> tuple[float, bool]:
    x = torch.randn(5, 3)
    if rank == 1:
        x[2, 1] = torch.nan
    x.requires_grad_()
    loss = DistributedLoss(LOSS, mode=mode)(x, torch.arange(5) % 2)
    loss.backward()
    return float(loss), bool(x.grad.isnan().all())


@pytest.mark.parametrize("mode", ["ring", "gather"])
def test_nan_on_one_rank_is_nan_on_all(mode: str) -> None:
    for loss, all_nan in run_ranks(3, nan_on_one, mode):
        assert loss != loss and all_nan


def groups_of(rank: int) -> list[str]:
    """A loss within a part of the ranks, and what those outside are told."""
    x, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)), torch.arange(4) % 2
    part = dist.new_group([0, 2])
    if rank == 1:
        with pytest.raises(TypeError, match="process_group must be None or a group that this rank is in"):
            DistributedLoss(LOSS, part)
        return ["outside"]
    return [f"{float(DistributedLoss(LOSS, part, mode=mode)(x, labels)):.5f}" for mode in ("ring", "gather")]


def test_a_group_of_some_ranks() -> None:
    first, outside, last = run_ranks(3, groups_of)
    assert outside == ["outside"] and first == last and len(set(first)) == 1
    x = torch.cat([torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)) for rank in (0, 2)])
    assert first[0] == f"{float(LOSS(x, torch.arange(8) % 2)):.5f}"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"loss": torch.nn.MSELoss()}, TypeError, "loss must be a batch loss of deepsim_ext.nn"),
        ({"loss": nn.BatchHardTripletLoss(reduction="none")}, ValueError, 'without reduction="none"'),
        (
            {"loss": LOSS, "mode": "tree"},
            ValueError,
            'mode must be one of "auto", "ring", "gather", got "tree"',
        ),
        (
            {"loss": LOSS, "averaged_gradients": 1},
            TypeError,
            "averaged_gradients must be True or False, got int 1",
        ),
        ({"loss": LOSS, "process_group": "gloo"}, TypeError, "process_group must be None or a group"),
    ],
)
def test_arguments_of_the_module(arguments: dict, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match="DistributedLoss: .*") as caught:
        DistributedLoss(**arguments)
    assert words in str(caught.value)
