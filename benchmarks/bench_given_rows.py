"""Losses of given triplets and pairs: T of them, normal rows of dimension D of length 1, float32.

Margins are such that about half of the triplets, and of the dissimilar pairs, matter. There is nothing to
multiply here: every row is read twice and every gradient written once; eager torch does that several times
over. torch's own Euclidean distances have 1e-6 added to every difference, hence the errors beside float64.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import deepsim_ext

from .report import Bar
from .timing import Contender, Inputs, Record, add_rates, measure

NAME = "given_rows"
D, MARGIN = 128, 0.01
PAIR_MARGIN = math.sqrt(2)
SIZES, QUICK_SIZES = (64, 1024, 16384), (64,)


def sqeuclidean_eager(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    d_ap, d_an = (anchor - positive).square().sum(dim=1), (anchor - negative).square().sum(dim=1)
    return F.relu(d_ap - d_an + MARGIN).mean()


def cosine_eager(anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    return F.triplet_margin_with_distance_loss(
        anchor,
        positive,
        negative,
        distance_function=lambda x, y: 1 - F.cosine_similarity(x, y),
        margin=MARGIN,
    )


def contrastive_eager(x1: Tensor, x2: Tensor, y: Tensor) -> Tensor:
    d = F.pairwise_distance(x1, x2)
    return (y * d.square() + (1 - y) * F.relu(PAIR_MARGIN - d).square()).mean()


# Ours and torch's, by the loss's name.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "triplet_margin sqeuclidean": (
        partial(deepsim_ext.triplet_margin_loss, margin=MARGIN),
        sqeuclidean_eager,
    ),
    "triplet_margin euclidean": (
        partial(deepsim_ext.triplet_margin_loss, margin=MARGIN, distance="euclidean"),
        partial(F.triplet_margin_loss, margin=MARGIN),
    ),
    "triplet_margin cosine": (
        partial(deepsim_ext.triplet_margin_loss, margin=MARGIN, distance="cosine"),
        cosine_eager,
    ),
    "contrastive": (partial(deepsim_ext.contrastive_loss, margin=PAIR_MARGIN), contrastive_eager),
}


def _on_lists(function: Callable[..., Tensor]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    return lambda leaves, constants: function(*leaves, *constants)


def case_name(loss: str, t: int) -> str:
    return f"{loss} T={t} D={D}"


def draw(loss: str, t: int) -> Inputs:
    sets, constants = (2, [(torch.arange(t) % 2).float()]) if loss == "contrastive" else (3, [])
    return Inputs([F.normalize(torch.randn(t, D), dim=1) for _ in range(sets)], constants)


def contenders(loss: str, skip_compile: str = "") -> list[Contender]:
    ours, eager = LOSSES[loss]
    compiled = torch.compile(eager, dynamic=False)
    return [
        Contender("deepsim_ext", _on_lists(ours), min_runs=50),
        Contender("torch eager", _on_lists(eager), min_runs=50),
        Contender("torch.compile", _on_lists(compiled), min_runs=50, skip=skip_compile),
    ]


def time_case(loss: str, t: int, seconds: float, skip_compile: str) -> list[Record]:
    """One record per contender and phase."""
    torch.manual_seed(0)
    torch.compiler.reset()
    exact = Contender("float64", _on_lists(LOSSES[loss][1]))
    measured = measure(
        contenders(loss, skip_compile), lambda: draw(loss, t), exact, seconds=seconds, max_runs=500
    )
    add_rates(measured, {}, product="", baseline="torch eager")
    return [{"op": NAME, "kind": "time", "case": case_name(loss, t)} | record for record in measured]


def jobs(quick: bool) -> list[tuple[str, Callable[[], list[Record]]]]:
    """What there is to measure, each with its name."""
    seconds, skip_compile = (0.1, "left out by --quick") if quick else (1.0, "")
    return [
        (case_name(loss, t), partial(time_case, loss, t, seconds, skip_compile))
        for t in (QUICK_SIZES if quick else SIZES)
        for loss in LOSSES
    ]


def bars(records: list[Record]) -> list[Bar]:
    """What the project promises, with the measured figures."""
    p50 = {
        (r["case"], r["contender"]): r["p50_ms"]
        for r in records
        if r.get("phase") == "both" and r.get("valid", True)
    }

    def speedup(loss: str, t: int, rival: str) -> float | None:
        ours, theirs = (p50.get((case_name(loss, t), name)) for name in ("deepsim_ext", rival))
        return None if ours is None or theirs is None else theirs / ours

    result = []
    for loss in LOSSES:
        eager = [speedup(loss, t, "torch eager") for t in SIZES]
        least = None if None in eager else min(eager)
        result.append(Bar(f"{loss} D={D}, least speed-up over torch eager of all T", least, at_least=1))
        compiled = [speedup(loss, t, "torch.compile") for t in SIZES]
        mean = None if None in compiled else statistics.geometric_mean(compiled)
        text = f"{loss} D={D}, geometric mean of the speed-up over torch.compile"
        result.append(Bar(text, mean, at_least=1))
    return result
