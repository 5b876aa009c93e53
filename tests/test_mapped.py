"""Embeddings on disk, chunk by chunk, against the same in one piece; memory; files that are refused."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

from benchmarks.memory import peak_in_subprocess
from deepsim_ext import evaluation, mapped
from deepsim_ext._mapped_rows import MappedRows
from deepsim_ext.reference.distances import pairwise

from .samples import DISTANCES

MIB = 2**20
DTYPES = ("float16", "float32", "float64", ">f4")


def rows(
    count: int, dtype: str = "float64", *, kind: str = "spread", d: int = 5, seed: int = 0
) -> np.ndarray:
    """[count, d]: "spread" or, so that many distances are equal, "grid" with duplicates and zero rows."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, d)) if kind == "spread" else random.integers(0, 3, size=(count, d))
    return x.astype(dtype)


def in_one_piece(queries: torch.Tensor, gallery: np.ndarray, k: int, distance: str):
    """By sorting all distances in float64."""
    d = pairwise(queries.double(), torch.from_numpy(gallery.astype("f8")), distance)
    found = d.sort(dim=1, stable=True)
    return found.values[:, :k], found.indices[:, :k]


def as_tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype("f8" if x.dtype.itemsize == 8 else "f4"))


# ---- neighbours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 30, 200])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64, 200, None])
@pytest.mark.parametrize("distance", DISTANCES)
def test_neighbours_are_those_of_one_piece(tmp_path, distance, chunk_rows, k):
    gallery = rows(200)
    np.save(tmp_path / "gallery.npy", gallery)
    for queries in (torch.from_numpy(rows(40, seed=1)), as_tensor(gallery[3:20])):
        got = mapped.nearest_neighbors(
            queries, tmp_path / "gallery.npy", k, distance=distance, chunk_rows=chunk_rows
        )
        distances, indices = in_one_piece(queries, gallery, k, distance)
        assert torch.equal(got.indices, indices)
        torch.testing.assert_close(got.distances, distances, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_rows", [3, 50, None])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
def test_equal_distances_come_by_index_over_all_chunks(distance, chunk_rows):
    """Whole numbers: their distances have no rounding, and most of them are equal."""
    gallery = rows(300, "float32", kind="grid", d=3)
    queries = as_tensor(rows(60, "float32", kind="grid", d=3, seed=1))
    for k in (1, 5, 60, 300):
        got = mapped.nearest_neighbors(queries, gallery, k, distance=distance, chunk_rows=chunk_rows)
        assert torch.equal(got.indices, in_one_piece(queries, gallery, k, distance)[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_files(tmp_path, dtype):
    """The arithmetic is that of the wider one, to the bit that it has with all in one chunk."""
    gallery = rows(150, dtype, kind="grid") / 7
    np.save(tmp_path / "gallery.npy", gallery.astype(dtype))
    for query_dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        queries = torch.from_numpy(rows(50, seed=1)).to(query_dtype)
        got = mapped.nearest_neighbors(queries, str(tmp_path / "gallery.npy"), 9, chunk_rows=16)
        wide = "float64" in (dtype, str(query_dtype).removeprefix("torch."))
        assert got.distances.dtype == (torch.float64 if wide else torch.float32)
        whole = mapped.nearest_neighbors(queries, np.load(tmp_path / "gallery.npy"), 9)
        assert torch.equal(got.indices, whole.indices) and torch.equal(got.distances, whole.distances)
        exact = in_one_piece(queries, np.load(tmp_path / "gallery.npy"), 9, "euclidean")[0]
        torch.testing.assert_close(got.distances.double(), exact, rtol=1e-6, atol=1e-6)


def test_more_neighbours_than_one_search_finds():
    gallery, queries = rows(2600, d=3), torch.from_numpy(rows(6, d=3, seed=1))
    for chunk_rows in (700, 1500, None):
        got = mapped.nearest_neighbors(queries, gallery, 2000, chunk_rows=chunk_rows)
        assert torch.equal(got.indices, in_one_piece(queries, gallery, 2000, "euclidean")[1])


def test_parts_of_arrays_no_queries_and_gradients(tmp_path):
    np.save(tmp_path / "x.npy", rows(90))
    part = np.load(tmp_path / "x.npy", mmap_mode="r")[30:70]
    queries = torch.from_numpy(rows(8, seed=2)).requires_grad_()
    got = mapped.nearest_neighbors(queries, part, 4, chunk_rows=9)
    assert torch.equal(got.indices, in_one_piece(queries.detach(), np.array(part), 4, "euclidean")[1])
    assert not got.distances.requires_grad
    assert mapped.nearest_neighbors(queries[:0], part, 4).indices.shape == (0, 4)


def test_changes_of_a_copy_on_write_map_are_kept(tmp_path):
    np.save(tmp_path / "x.npy", rows(64, "float32"))
    changed = np.load(tmp_path / "x.npy", mmap_mode="c")
    changed[:] = 7
    mapped.nearest_neighbors(torch.zeros(1, 5), changed, 3, chunk_rows=10)
    assert (changed == 7).all()
    shared = np.load(tmp_path / "x.npy", mmap_mode="r+")
    shared[:] = 8
    mapped.nearest_neighbors(torch.zeros(1, 5), shared, 3, chunk_rows=10)
    assert (shared == 8).all()


# ---- metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["spread", "grid"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("first_look", "chunk_rows"), [(1, 1), (1, 23), (128, 50), (128, None)])
def test_metrics_are_those_of_one_piece(tmp_path, monkeypatch, distance, kind, first_look, chunk_rows):
    """To the bit; with a `first_look` of 1 most first matches are looked for behind the neighbours."""
    monkeypatch.setattr(evaluation, "FIRST_LOOK", first_look)
    monkeypatch.setattr(evaluation, "WORKSPACE", 4000)
    x, refs = rows(260, kind=kind), rows(150, kind=kind, seed=1)
    labels, ref_labels = (torch.from_numpy(np.random.default_rng(n).integers(0, 70, n)) for n in (260, 150))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "refs.npy", refs)
    options = {"distance": distance, "recall_at": (1, 3), "avg_of_avgs": kind == "grid"}
    exact = evaluation.retrieval_metrics(as_tensor(x), labels, **options)
    got = mapped.retrieval_metrics(tmp_path / "x.npy", labels, chunk_rows=chunk_rows, **options)
    assert got == exact and 0 < got.mean_reciprocal_rank < 1
    against = as_tensor(refs), ref_labels
    exact = evaluation.retrieval_metrics(as_tensor(x), labels, *against, **options)
    on_disk = tmp_path / "refs.npy", ref_labels
    assert mapped.retrieval_metrics(x, labels, *on_disk, chunk_rows=chunk_rows, **options) == exact
    assert exact.lone_queries > 0
    assert mapped.retrieval_metrics(x, labels, x, labels, **options) == mapped.retrieval_metrics(
        x, labels, **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics_of_all_dtypes(dtype):
    x, labels = rows(120, dtype), torch.arange(120) % 17
    exact = evaluation.retrieval_metrics(as_tensor(x), labels)
    assert mapped.retrieval_metrics(x, labels, chunk_rows=32) == exact
    mixed = mapped.retrieval_metrics(x, labels, x.astype("f8")[:50], labels[:50], chunk_rows=32)
    assert mixed == evaluation.retrieval_metrics(
        as_tensor(x).double(), labels, as_tensor(x)[:50].double(), labels[:50]
    )


def test_nobody_has_a_match():
    for refs in ((), (rows(3), torch.arange(3) + 10), (rows(0), torch.arange(0))):
        got = mapped.retrieval_metrics(rows(4), torch.arange(4), *refs)
        assert (got.queries, got.lone_queries) == (0, 4) and got.r_precision != got.r_precision
    assert mapped.retrieval_metrics(rows(0), torch.arange(0)).lone_queries == 0


# ---- memory and progress -----------------------------------------------------------------------------------


def neighbors_probe(path: str):
    queries = torch.randn(100, 128, generator=torch.Generator().manual_seed(0))
    return (
        lambda: mapped.nearest_neighbors(queries, path, 10),
        lambda: mapped.nearest_neighbors(queries, rows(200, "f4", d=128), 10),
    )


def metrics_probe(path: str):
    """A few queries have a match, far apart in the file."""
    count = len(np.load(path, mmap_mode="r"))
    labels = torch.arange(count)
    labels[:: count // 200] = 0
    few = rows(200, "f4", d=128)
    return (
        lambda: mapped.retrieval_metrics(path, labels),
        lambda: mapped.retrieval_metrics(few, torch.arange(200) % 9),
    )


@pytest.mark.parametrize(("probe", "mib", "most"), [("neighbors", 256, 64), ("metrics", 256, 96)])
def test_files_larger_than_what_may_be_resident(tmp_path, probe, mib, most):
    """With the metrics there are half a million labels, and for a while a few numbers for each."""
    path = tmp_path / "x.npy"
    count = mib * MIB // (128 * 4)
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, 128)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in range(16):
            np.random.default_rng(chunk).random((count // 16, 128), np.float32).tofile(file)
    assert path.stat().st_size > mib * MIB
    assert peak_in_subprocess(f"tests.test_mapped:{probe}_probe", str(path)) < most * MIB


def test_progress(capsys, monkeypatch):
    x, labels = rows(40), torch.arange(40) % 4
    mapped.nearest_neighbors(as_tensor(x[:2]), x, 1, chunk_rows=9)
    mapped.retrieval_metrics(x, labels)
    assert capsys.readouterr().err == ""
    mapped.nearest_neighbors(as_tensor(x[:2]), x, 1, chunk_rows=9, progress=True)
    assert "nearest_neighbors: 100%" in capsys.readouterr().err
    mapped.retrieval_metrics(x, labels, progress=True)
    assert "40.0/40.0" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"^retrieval_metrics: tqdm not installed; pip install deepsim"):
        mapped.retrieval_metrics(x, labels, progress=True)


# ---- errors ------------------------------------------------------------------------------------------------


BAD_GALLERIES = [
    (np.ones((4, 3, 1)), ValueError, "got float64 [4, 3, 1]"),
    (np.ones((4, 0)), ValueError, "got float64 [4, 0]"),
    (np.ones((4, 3), int), TypeError, "got int64 [4, 3]"),
    (np.ones((3, 4)).T, ValueError, "in C order, got float64 [4, 3] of another order in memory"),
    (np.ones((8, 3))[::2], ValueError, "of another order in memory"),
    (torch.ones(4, 3), TypeError, "or the path of a .npy file, got float32 [4, 3]"),
    (np.ones((4, 2)), ValueError, "[G, D]=[G, 3], got float32 [4, 2]"),
    (np.array([[0, 0, 0], [1, 1, np.nan]]), ValueError, "got a NaN or inf in row 1"),
    (np.full((4, 3), 1e30, np.float32), ValueError, "got a longer one in row 0"),
]


@pytest.mark.parametrize(("gallery", "kind", "text"), BAD_GALLERIES)
def test_galleries_that_are_refused(tmp_path, gallery, kind, text):
    with pytest.raises(
        kind, match=rf"^nearest_neighbors: gallery must be .*{re.escape(text.split('must be ')[-1])}"
    ):
        mapped.nearest_neighbors(torch.zeros(1, 3), gallery, 1, chunk_rows=1)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"queries": np.zeros((1, 3))}, TypeError, "queries must be float32, float64, bfloat16 or float16"),
        ({"queries": torch.full((2, 3), torch.nan)}, ValueError, "queries must be finite"),
        ({"k": 0}, ValueError, "k must be an integer >= 1, got int 0"),
        ({"k": 5}, ValueError, "k must be an integer from 1 to 4, got int 5"),
        ({"k": 1.0}, TypeError, "k must be an integer >= 1, got float 1.0"),
        ({"distance": "l2"}, ValueError, "distance must be one of"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be an integer >= 1, got int 0"),
        ({"progress": 1}, TypeError, "progress must be True or False, got int 1"),
    ],
)
def test_errors_of_neighbours(changes, kind, text):
    arguments = {"queries": torch.zeros(1, 3), "gallery": rows(4, d=3), "k": 1} | changes
    with pytest.raises(kind, match=f"^nearest_neighbors: {re.escape(text)}"):
        mapped.nearest_neighbors(**arguments)


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"embeddings": torch.zeros(4, 3)}, TypeError, "embeddings must be a NumPy array, mapped or not, or"),
        (
            {"labels": torch.zeros(3).long()},
            ValueError,
            "labels must be int64 of shape [N]=[4], got int64 [3]",
        ),
        ({"labels": [0, 0, 0, 0]}, TypeError, "labels must be int64 of shape [N]=[4], got list"),
        ({"ref_embeddings": rows(2, d=3)}, ValueError, "ref_labels must be given together with"),
        ({"ref_embeddings": rows(2, d=2), "ref_labels": torch.zeros(2).long()}, ValueError, "ref_embeddings"),
        ({"embeddings": np.full((4, 3), np.inf)}, ValueError, "embeddings must be finite, with rows shorter"),
        (
            {"ref_embeddings": np.full((1, 3), np.nan), "ref_labels": torch.tensor([8])},
            ValueError,
            "ref_embeddings must be finite, with rows shorter than 1e+152, got a NaN or inf in row 0",
        ),
        ({"recall_at": 5}, TypeError, "recall_at must be a list or tuple of integers >= 1, got int 5"),
        ({"chunk_rows": 1.5}, TypeError, "chunk_rows must be an integer >= 1, got float 1.5"),
    ],
)
def test_errors_of_metrics(changes, kind, text):
    arguments = {"embeddings": rows(4, d=3), "labels": torch.zeros(4).long()} | changes
    with pytest.raises(kind, match=f"^retrieval_metrics: {re.escape(text)}"):
        mapped.retrieval_metrics(**arguments)


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^nearest_neighbors: .*x\.npy must be a \.npy file, got "):
        mapped.nearest_neighbors(torch.zeros(1, 3), path, 1)
    np.save(path, np.asfortranarray(rows(6, d=3)))
    with pytest.raises(ValueError, match="in C order, got float64"):
        MappedRows("f", "gallery", path)
