"""Exact nearest neighbours: the compiled op against sorting all distances."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import nearest_neighbors, reference

from .samples import DISTANCES, DTYPES, batch_hard_samples

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_distance = pytest.mark.parametrize("distance", DISTANCES)


def sets(dtype=torch.float64, small=False):
    """Name, queries and gallery of the samples that tests of mining use."""
    for s in batch_hard_samples(dtype, small):
        # Cosine distances in one column are all 0 or 2: rounding alone says which of two is larger.
        if s.name != "one_column":
            yield s.name, s.tensors[0], s.tensors[2]


@by_dtype
@by_distance
@pytest.mark.parametrize("k", [1, 3, 40, 190])
def test_matches_the_reference(k, distance, dtype):
    compared = 0
    for name, queries, gallery in sets(dtype):
        if k > (len(queries) - 1 if gallery is None else len(gallery)):
            continue
        compared += 1
        got = nearest_neighbors(queries, gallery, k, distance=distance)
        exact = reference.nearest_neighbors(
            queries.double(), None if gallery is None else gallery.double(), k, distance=distance
        )
        assert got.distances.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        rtol = 1e-12 if dtype is torch.float64 else 1e-6
        # Of two that are within rounding of the k-th place either may be taken.
        scale = max(1.0, exact.distances.max().item()) if exact.distances.numel() else 1.0
        torch.testing.assert_close(got.distances.double(), exact.distances, rtol=10 * rtol, atol=rtol * scale)
        if dtype is torch.float64:
            assert torch.equal(got.indices, exact.indices), name
        assert (got.distances.diff(dim=1) >= 0).all()
        same = got.distances.diff(dim=1) == 0
        assert (got.indices.diff(dim=1)[same] > 0).all()
    assert compared >= 3


@by_dtype
def test_duplicates_come_in_the_order_of_their_indices(dtype):
    g = torch.Generator().manual_seed(2)
    points = torch.randn(12, 20, generator=g).to(dtype)
    which = torch.randint(12, (400,), generator=g)
    x = points[which]
    k = 9
    _, indices = nearest_neighbors(x, None, k)
    for i in range(400):
        equal = [j for j in range(400) if which[j] == which[i] and j != i]
        assert indices[i, : len(equal)].tolist() == equal[:k]
    # In a gallery a query finds itself first, or the first of its copies.
    _, nearest = nearest_neighbors(x, x.clone(), 1)
    first = torch.stack([(which == w).nonzero()[0, 0] for w in which])
    assert torch.equal(nearest[:, 0], first)


def test_as_many_neighbours_as_there_are():
    x = torch.randn(1100, 3, generator=torch.Generator().manual_seed(1))
    distances, indices = nearest_neighbors(x, None, 1024)
    assert indices.shape == distances.shape == (1100, 1024)
    assert (indices != torch.arange(1100)[:, None]).all()
    assert all(len(row.unique()) == 1024 for row in indices[:5])
    few = nearest_neighbors(x[:6], None, 5).indices
    assert torch.equal(
        few.sort(dim=1).values, torch.tensor([[j for j in range(6) if j != i] for i in range(6)])
    )
    assert nearest_neighbors(x[:0], x, 7).indices.shape == (0, 7)


def test_neighbours_are_right_where_the_gram_form_cancels():
    g = torch.Generator().manual_seed(5)
    x = torch.randn(300, 32, generator=g) * 0.1 + torch.tensor([[0.0], [1e3]]).repeat(150, 1) + 100
    got, exact = nearest_neighbors(x, None, 5), reference.nearest_neighbors(x.double(), None, 5)
    torch.testing.assert_close(got.distances.double(), exact.distances, rtol=1e-3, atol=0)
    assert (got.indices == exact.indices).float().mean() > 0.98


@pytest.mark.parametrize("count", [1, 2, 16, 17])  # on both sides of where a few queries go their own way
@by_distance
def test_few_queries(count, distance):
    g = torch.Generator().manual_seed(count)
    gallery = torch.randn(3000, 40, generator=g, dtype=torch.float64)
    gallery[1000:1500] = gallery[:500]  # ties far apart
    queries = gallery[torch.randint(3000, (count,), generator=g)] + 0.1 * torch.randn(1, 40, generator=g)
    for k in (1, 7, 1024):
        got = nearest_neighbors(queries, gallery, k, distance=distance)
        exact = reference.nearest_neighbors(queries, gallery, k, distance=distance)
        torch.testing.assert_close(got.distances, exact.distances, rtol=1e-12, atol=1e-14)
        assert torch.equal(got.indices, exact.indices)
        strided = nearest_neighbors(
            queries.T.contiguous().T, gallery.repeat(1, 2)[:, :40], k, distance=distance
        )
        assert torch.equal(strided.indices, got.indices)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x, y = queries.to(dtype), gallery.to(dtype)
            narrow = nearest_neighbors(x, y, k, distance=distance).distances
            wide = reference.nearest_neighbors(x.double(), y.double(), k, distance=distance).distances
            torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-6)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert torch.equal(nearest_neighbors(queries, gallery, k, distance=distance).indices, got.indices)
        finally:
            torch.set_num_threads(threads)


def test_a_query_far_away_does_not_matter_to_the_others():
    g = torch.Generator().manual_seed(6)
    gallery, queries = torch.randn(200, 24, generator=g), torch.randn(50, 24, generator=g)
    alone = nearest_neighbors(queries, gallery, 3)
    queries[7] += 1e10
    together = nearest_neighbors(queries, gallery, 3)
    others = torch.arange(50) != 7
    assert torch.equal(together.indices[others], alone.indices[others])
    assert torch.equal(together.distances[others], alone.distances[others])


def near_ties(kind, dtype):
    """[300, 20], many of them at distances from each other that are equal, or differ in their last digits."""
    g = torch.Generator().manual_seed(8)
    which, d = torch.randint(9, (300,), generator=g), 20
    if kind == "whole numbers":
        return torch.randint(3, (300, d), generator=g).to(dtype)
    points = torch.randn(9, d, generator=g, dtype=torch.float64)[which]
    if kind == "parallel":  # at one cosine distance, but for its rounding
        points *= torch.rand(300, 1, generator=g) + 0.5
    elif kind == "shells":  # of a radius that differs by a few units of rounding
        points = torch.nn.functional.normalize(torch.randn(300, d, generator=g, dtype=torch.float64))
        points *= 1 + torch.finfo(dtype).eps * torch.randn(300, 1, generator=g).double()
        points[:3] = 0
    elif kind == "far away":  # tight clusters, far from each other
        points = 100 * points + 1e-5 * torch.randn(300, d, generator=g).double()
    return points.to(dtype)


@pytest.mark.parametrize("self_form", [True, False])
@pytest.mark.parametrize("kind", ["duplicates", "whole numbers", "parallel", "shells", "far away"])
@by_distance
@by_dtype
def test_fewer_neighbours_are_the_first_of_all(dtype, distance, kind, self_form):
    """Rounding of what narrows the search down does not decide who comes last, nor do ties."""
    gallery = near_ties(kind, dtype)
    queries = gallery if self_form else gallery[torch.arange(40, 100)].clone()
    everyone = nearest_neighbors(queries, gallery, len(gallery) - self_form, distance=distance)
    for k in (1, 5, 30, 200):
        got = nearest_neighbors(queries, gallery, k, distance=distance)
        assert torch.equal(got.indices, everyone.indices[:, :k])
        assert torch.equal(got.distances, everyone.distances[:, :k])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("count", [4, 40])
@by_distance
def test_a_nan_or_inf_or_too_long_a_row_finds_nobody(bad, count, distance):
    for where in range(2):
        both = [torch.randn(count, 4), torch.randn(30, 4)]
        both[where][3, 1] = bad
        result = nearest_neighbors(*both, 3, distance=distance)
        if bad == 1e20 and distance == "cosine":
            assert result.distances.isfinite().all() and (result.indices >= 0).all()
        else:
            assert result.distances.isnan().all() and (result.indices == -1).all()


def test_the_same_for_any_number_of_threads():
    x = torch.randn(900, 30, generator=torch.Generator().manual_seed(3))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(nearest_neighbors(x, None, 17))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for f in found[1:] for a, b in zip(f, found[0], strict=True))


def test_transforms_and_opcheck():
    for i, (_, queries, gallery) in enumerate(sets(torch.float32, small=True)):
        if len(queries) > 2:
            opcheck(torch.ops.deepsim_ext.nearest_neighbors.default, (queries, gallery, 2, DISTANCES[i % 3]))
    x = torch.randn(3, 20, 5, requires_grad=True)
    looped = [nearest_neighbors(each, None, 4) for each in x]
    batched = torch.vmap(lambda x: nearest_neighbors(x, None, 4))(x)
    assert torch.equal(batched.indices, torch.stack([r.indices for r in looped]))
    assert not batched.distances.requires_grad
    compiled = torch.compile(lambda x: nearest_neighbors(x, None, 4).indices, fullgraph=True, dynamic=True)
    for n in (20, 13):
        assert torch.equal(compiled(x[0, :n]), nearest_neighbors(x[0, :n], None, 4).indices)


def test_the_op_guards_memory():
    op, x = torch.ops.deepsim_ext.nearest_neighbors, torch.randn(6, 3)
    with pytest.raises(ValueError, match="k must be from 1 to 5, got 6"):
        op(x, None, 6, "euclidean")
    with pytest.raises(ValueError, match="k must be from 1 to 6, got 0"):
        op(x, x, 0, "euclidean")
    with pytest.raises(ValueError, match=r"gallery must be of shape \[6, 3\]"):
        op(x, torch.randn(6, 4), 1, "euclidean")
    with pytest.raises(TypeError, match="gallery must be"):
        op(x, x.double(), 1, "euclidean")
