"""Retrieval metrics over all ranks against one process with all rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from deepsim_ext import evaluation
from deepsim_ext.distributed import retrieval_metrics
from deepsim_ext.evaluation import RetrievalMetrics

from ..samples import DISTANCES
from .ranks import run_ranks
from .test_losses import offsets

# Rows of each rank, of whom there may be fewer.
ROWS = {"even": (50, 50, 50, 50), "uneven": (90, 0, 1, 40), "late": (0, 0, 120, 1)}
REFERENCES = (0, 70, 9, 40)


class Case(NamedTuple):
    kind: str  # "spread" or, with many equal distances, "grid"
    dtype: torch.dtype
    source: str  # "tensor" or "file"
    rows: str
    own: bool  # whether the rows are their own references
    distance: str
    avg_of_avgs: bool = False


CASES = [
    *(
        Case("spread", torch.float32, source, "uneven", own, distance)
        for source, own, distance in itertools.product(("tensor", "file"), (True, False), DISTANCES)
    ),
    *(
        Case("grid", torch.float32, source, rows, own, "sqeuclidean", True)
        for source, rows, own in itertools.product(("tensor", "file"), ROWS, (True, False))
    ),
    *(Case("spread", t, "tensor", "even", True, "cosine") for t in (torch.float64, torch.bfloat16)),
]


def draw(case: Case, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = (torch.rand(rows, generator=g) ** 2 * 30).long()
    if case.kind == "grid":
        return torch.randint(3, (rows, 4), generator=g).to(case.dtype), labels
    near = torch.randn(30, 5, generator=g)[labels] + torch.randn(rows, 5, generator=g)
    return near.to(case.dtype), labels


def arguments_of(case: Case, world_size: int, rank: int | None, folder: Path) -> list[object]:
    """A rank's rows, or all of them for None, with labels; and if it has others, references."""
    sizes = [(ROWS[case.rows], 1)] + ([] if case.own else [(REFERENCES, 2)])
    arguments: list[object] = []
    for rows_of, seed in sizes:
        ends = offsets(rows_of[:world_size])
        x, labels = draw(case, ends[-1], seed)
        if rank is not None:
            x, labels = (t[ends[rank] : ends[rank + 1]] for t in (x, labels))
            if case.source == "file":
                path = folder / f"{seed}-{rank}.npy"
                np.save(path, x.numpy())
                x = path
        arguments += [x, labels]
    return arguments


def on_a_rank(rank: int, world_size: int, folder: Path, first_look: int) -> list[RetrievalMetrics]:
    evaluation.FIRST_LOOK, evaluation.WORKSPACE = first_look, 1500
    return [
        retrieval_metrics(
            *arguments_of(case, world_size, rank, folder),
            distance=case.distance,
            avg_of_avgs=case.avg_of_avgs,
            recall_at=(1, 3),
            chunk_rows=23,
        )
        for case in CASES
    ]


@pytest.mark.parametrize("first_look", [1, 128])  # with 1, most first matches are looked for behind it
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_as_one_process(tmp_path: Path, world_size: int, first_look: int) -> None:
    """All ranks have the numbers of all rows, to the bit."""
    compared = 0
    found = run_ranks(world_size, on_a_rank, world_size, tmp_path, first_look)
    for case, *of_ranks in zip(CASES, *found, strict=True):
        exact = evaluation.retrieval_metrics(
            *arguments_of(case, world_size, None, tmp_path),
            distance=case.distance,
            avg_of_avgs=case.avg_of_avgs,
            recall_at=(1, 3),
        )
        assert all(repr(metrics) == repr(exact) for metrics in of_ranks), case  # NaN is NaN
        compared += exact.queries > 0 and 0 < exact.mean_reciprocal_rank < 1
    assert compared >= len(CASES) / 2 or world_size == 1


def test_without_a_group() -> None:
    x, labels = draw(CASES[0], 80, 1)
    exact = evaluation.retrieval_metrics(x, labels)
    assert retrieval_metrics(x, labels) == exact == retrieval_metrics(x.numpy(), labels)
    assert retrieval_metrics(x, labels, x, labels) == exact, "its own references, by another name"


# ---- errors ------------------------------------------------------------------------------------------------


def words_of_a_bad_rank(rank: int, mistake: str, folder: Path) -> tuple[str, str, RetrievalMetrics]:
    """(kind, words) of the error on this rank, where rank 1 makes the mistake, and the metrics after it."""
    x, labels = draw(CASES[0], 60, 1)
    bad, bad_labels, options = x, labels, {}
    if rank == 1:
        broken = x.numpy().copy()
        broken[41, 2] = np.inf
        np.save(folder / "x.npy", broken)
        bad, bad_labels, options = {
            "labels": (x, labels.float(), {}),
            "nan": (x / 0, labels, {}),
            "file": (folder / "x.npy", labels, {}),
            "one reference": (x, labels, {"ref_embeddings": x[:1]}),
            "columns": (x[:, :2], labels, {}),
            "dtype": (x.double(), labels, {}),
            "recall_at": (x, labels, {"recall_at": (1,)}),
            "other references": (x, labels, {"ref_embeddings": x[:1], "ref_labels": labels[:1]}),
        }[mistake]
    with pytest.raises(Exception, match=".") as caught:
        retrieval_metrics(bad, bad_labels, **options)
    return caught.type.__name__, str(caught.value), retrieval_metrics(x, labels)


@pytest.mark.parametrize(
    ("mistake", "kind", "words"),
    [
        ("labels", "TypeError", "labels must be int64 of shape [N]=[60], got float32 [60]"),
        ("nan", "ValueError", "embeddings must be finite"),
        ("file", "ValueError", "got a NaN or inf in row 41"),
        ("one reference", "ValueError", "ref_labels must be given together with"),
    ],
)
def test_a_mistake_on_one_rank(tmp_path: Path, mistake: str, kind: str, words: str) -> None:
    others = run_ranks(3, words_of_a_bad_rank, mistake, tmp_path)
    bad = others.pop(1)
    assert bad[0] == kind and bad[1].startswith("retrieval_metrics: ") and words in bad[1]
    for name, text, _ in others:
        assert name == "RuntimeError" and words in text
        assert text.startswith(f"retrieval_metrics: rank 1 failed: {kind}: retrieval_metrics: ")
    assert len({metrics.r_precision for *_, metrics in (bad, *others)}) == 1, "and the next call is right"


@pytest.mark.parametrize("mistake", ["columns", "dtype", "recall_at", "other references"])
def test_ranks_that_do_not_agree(tmp_path: Path, mistake: str) -> None:
    for name, text, _ in run_ranks(3, words_of_a_bad_rank, mistake, tmp_path):
        assert name == "ValueError"
        assert text.startswith("retrieval_metrics: embeddings must be the same on all ranks")
        assert text.endswith("on rank 1")
