"""A gallery that is spread over all ranks against one process with all of it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import deepsim_ext
from deepsim_ext import mapped
from deepsim_ext.distributed import nearest_neighbors
from deepsim_ext.results import NearestNeighbors

from ..samples import DISTANCES
from .ranks import run_ranks
from .test_losses import offsets

# Rows of each rank, of whom there may be fewer.
QUERIES = {"even": (20, 20, 20, 20), "uneven": (33, 1, 0, 50), "few": (0, 2, 0, 0), "none": (0, 0, 0, 0)}
GALLERIES = {"even": (60, 60, 60, 60), "uneven": (130, 0, 3, 90), "late": (0, 150, 1, 0)}


class Case(NamedTuple):
    kind: str  # "spread" or, with many equal distances, "grid"
    dtype: torch.dtype
    source: str  # "tensor", "array" or "file"
    queries: str
    gallery: str
    k: int
    distance: str


CASES = [
    *(
        Case("spread", torch.float32, source, "uneven", "uneven", k, distance)
        for source, k, distance in itertools.product(("tensor", "file"), (1, 9, 100), DISTANCES)
    ),
    *(
        Case("grid", torch.float32, source, queries, gallery, k, distance)
        for queries, gallery in itertools.product(QUERIES, GALLERIES)
        for source, k, distance in (("tensor", 7, "euclidean"), ("array", 40, "cosine"))
    ),
    *(
        Case("spread", dtype, "tensor", "even", "even", 5, "euclidean")
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
    ),
    *(Case("spread", dtype, "file", "even", "late", 5, "cosine") for dtype in (torch.float64, torch.float16)),
]


def draw(kind: str, rows: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=g) if kind == "spread" else torch.randint(3, (rows, 3), generator=g)
    return x.to(dtype)


def on_a_rank(rank: int, world_size: int, folder: Path) -> list[NearestNeighbors]:
    found = []
    for case in CASES:
        q, g = (offsets(s[:world_size]) for s in (QUERIES[case.queries], GALLERIES[case.gallery]))
        queries, gallery = draw(case.kind, q[-1], case.dtype, 1), draw(case.kind, g[-1], case.dtype, 2)
        part = gallery[g[rank] : g[rank + 1]]
        if case.source == "array":
            part = part.numpy()
        elif case.source == "file":
            np.save(folder / f"{rank}.npy", part.numpy())
            part = folder / f"{rank}.npy"
        k = min(case.k, g[-1])
        if k:
            mine = queries[q[rank] : q[rank + 1]]
            found.append(nearest_neighbors(mine, part, k, distance=case.distance, chunk_rows=17))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_as_one_process(tmp_path: Path, world_size: int) -> None:
    """To the bit, equal distances by index in the whole gallery."""
    sizes = {name: sum(s[:world_size]) for name, s in GALLERIES.items()}
    cases = [case for case in CASES if sizes[case.gallery]]
    for case, *of_ranks in zip(cases, *run_ranks(world_size, on_a_rank, world_size, tmp_path), strict=True):
        queries = draw(case.kind, sum(QUERIES[case.queries][:world_size]), case.dtype, 1)
        gallery = draw(case.kind, sizes[case.gallery], case.dtype, 2)
        k = min(case.k, len(gallery))
        whole = deepsim_ext.nearest_neighbors(queries, gallery, k, distance=case.distance)
        assert torch.cat([found.indices for found in of_ranks]).equal(whole.indices), case
        assert torch.cat([found.distances for found in of_ranks]).equal(whole.distances), case


def many_neighbours(rank: int) -> NearestNeighbors:
    gallery = draw("grid", 2600, torch.float32, 2)
    return nearest_neighbors(gallery[:3], gallery[:900] if rank == 0 else gallery[900:], 2000)


def test_more_neighbours_than_one_search_finds() -> None:
    gallery = draw("grid", 2600, torch.float32, 2)
    whole = mapped.nearest_neighbors(gallery[:3], gallery.numpy(), 2000)
    for found in run_ranks(2, many_neighbours):
        assert found.indices.equal(whole.indices) and found.distances.equal(whole.distances)


def a_few_at_a_time(rank: int, world_size: int) -> tuple[NearestNeighbors, int]:
    """And how often this rank's part of the gallery was searched."""
    from deepsim_ext import _on_disk
    from deepsim_ext.distributed import neighbors

    neighbors.WORKSPACE = 4 * 10 * world_size  # for 10 queries of each rank
    passes, read = [], _on_disk.OnDisk.nearest
    _on_disk.OnDisk.nearest = lambda *args: passes.append(len(args[1])) or read(*args)
    queries, gallery = draw("spread", 50, torch.float64, 1), draw("spread", 40, torch.float64, 2)
    mine = queries[:35] if rank == 0 else queries[35:]
    found = nearest_neighbors(mine, gallery.numpy()[20 * rank : 20 * rank + 20], 4)
    return found, len(passes)


def test_each_part_is_read_once_for_many_queries_of_all_ranks() -> None:
    queries, gallery = draw("spread", 50, torch.float64, 1), draw("spread", 40, torch.float64, 2)
    found, passes = zip(*run_ranks(2, a_few_at_a_time, 2), strict=True)
    assert passes == (4, 4), "as many as rank 0 needs for its 35 queries"
    whole = deepsim_ext.nearest_neighbors(queries, gallery, 4)
    assert torch.cat([f.indices for f in found]).equal(whole.indices)


def test_without_a_group() -> None:
    queries, gallery = draw("grid", 30, torch.float32, 1), draw("grid", 80, torch.float32, 2)
    whole = deepsim_ext.nearest_neighbors(queries, gallery, 5)
    for part in (gallery, gallery.numpy()):
        found = nearest_neighbors(queries, part, 5)
        assert found.indices.equal(whole.indices) and found.distances.equal(whole.distances)


# ---- errors ------------------------------------------------------------------------------------------------


def words_of_a_bad_rank(rank: int, mistake: str, folder: Path) -> tuple[str, str, int]:
    """(kind, words) of the error on this rank, where rank 1 makes the mistake, and a search after it."""
    queries, gallery = torch.randn(4, 3), torch.randn(6, 3)
    arguments = {"queries": queries, "gallery": gallery, "k": 2}
    if mistake == "too many":
        arguments["k"] = 19
    elif rank == 1:
        broken = gallery.numpy().copy()
        broken[5, 1] = np.nan
        np.save(folder / "x.npy", broken)
        arguments |= {
            "queries": {"queries": queries.numpy()},
            "nan": {"queries": queries / 0},
            "file": {"gallery": folder / "x.npy"},
            "missing file": {"gallery": folder / "y.npy"},
            "columns of the gallery": {"gallery": gallery[:, :2]},
            "columns": {"queries": queries[:, :2], "gallery": gallery[:, :2]},
            "dtype": {"gallery": gallery.double().numpy()},
            "k": {"k": 3},
            "distance": {"distance": "cosine"},
            "chunk_rows": {"chunk_rows": 0},
        }[mistake]
    with pytest.raises(Exception, match=".") as caught:
        nearest_neighbors(**arguments)
    return caught.type.__name__, str(caught.value), len(nearest_neighbors(queries, gallery, 18).indices)


@pytest.mark.parametrize(
    ("mistake", "kind", "words"),
    [
        ("queries", "TypeError", "queries must be float32, float64, bfloat16 or float16"),
        ("nan", "ValueError", "queries must be finite"),
        ("file", "ValueError", "shorter than 1e+18, got a NaN or inf in row 5"),
        ("missing file", "ValueError", "y.npy must be a .npy file, got No such file"),
        ("columns of the gallery", "ValueError", "gallery must be"),
        ("chunk_rows", "ValueError", "chunk_rows must be an integer >= 1, got int 0"),
    ],
)
def test_a_mistake_on_one_rank(tmp_path: Path, mistake: str, kind: str, words: str) -> None:
    others = run_ranks(3, words_of_a_bad_rank, mistake, tmp_path)
    bad = others.pop(1)
    assert bad[0] == kind and bad[1].startswith("nearest_neighbors: ") and words in bad[1]
    for name, text, _ in others:
        assert name == "RuntimeError" and words in text
        assert text.startswith(f"nearest_neighbors: rank 1 failed: {kind}: nearest_neighbors: ")
    assert {count for *_, count in (bad, *others)} == {4}, "and the next call is as good as any"


@pytest.mark.parametrize("mistake", ["columns", "dtype", "k", "distance"])
def test_ranks_that_do_not_agree(tmp_path: Path, mistake: str) -> None:
    for name, text, _ in run_ranks(3, words_of_a_bad_rank, mistake, tmp_path):
        assert name == "ValueError"
        assert text.startswith("nearest_neighbors: queries must be the same on all ranks")
        assert text.endswith("on rank 1")


def test_more_neighbours_than_all_ranks_have(tmp_path: Path) -> None:
    for name, text, _ in run_ranks(3, words_of_a_bad_rank, "too many", tmp_path):
        assert name == "ValueError"
        assert text == "nearest_neighbors: k must be an integer from 1 to 18, got int 19"
