"""Distances of given pairs and their gradient: against autograd in float64, and plain torch."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import reference
from deepsim_ext.pair_distances import pair_distances, pair_distances_backward
from deepsim_ext.reference.distances import rowwise

from .samples import DISTANCES, DTYPES

by_distance = pytest.mark.parametrize("distance", DISTANCES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def draw(dtype, d, pairs=400):
    """x [60, d], ref [45, d], indices, weights: rows in no pair, in many, zero, equal to their partners."""
    g = torch.Generator().manual_seed(d)
    x, ref = (torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype) for n in (60, 45))
    x[3] = 0
    ref[[7, 8]] = 0
    ref[9] = x[9]
    rows, others = (torch.randint(n, (pairs,), generator=g) for n in (50, 45))
    rows[::7] = 9
    rows[:6], others[:6] = torch.tensor([3, 3, 9, 9, 9, 5]), torch.tensor([7, 2, 9, 9, 8, 7])
    weights = torch.randn(pairs, generator=g, dtype=torch.float64)
    return x, ref, rows, others, weights.to(torch.float64 if dtype is torch.float64 else torch.float32)


def exact(x, ref, rows, others, weights, distance):
    x, ref = (t.double().requires_grad_() for t in (x, ref))
    d = rowwise(x[rows], ref[others], distance)
    return d.detach(), *torch.autograd.grad(d, (x, ref), weights.double())


@pytest.mark.parametrize("d", [1, 5, 64, 131])
@by_distance
@by_dtype
def test_values_and_gradients(dtype, distance, d):
    x, ref, rows, others, weights = draw(dtype, d)
    if distance == "cosine" and d == 1:
        x, ref = x.sign(), ref.sign()  # else rounding alone says which of two derivatives near 0 is larger
    expected, *grads = exact(x, ref, rows, others, weights, distance)
    tolerance = 1e-12 if dtype is torch.float64 else 2e-5
    for strided in (False, True):
        if strided:
            x, ref = x.T.contiguous().T, ref.repeat(1, 2)[:, :d]
        for module in (None, reference):
            if module is None:
                measured = pair_distances(x, ref, rows, others, distance=distance)
                got = pair_distances_backward(weights, measured, x, ref, rows, others, distance=distance)
            else:
                measured = module.pair_distances(x, ref, rows, others, distance)
                got = module.pair_distances_backward(weights, measured, x, ref, rows, others, distance)
            assert measured.dtype == got[0].dtype == got[1].dtype == weights.dtype
            torch.testing.assert_close(measured.double(), expected, rtol=tolerance, atol=tolerance)
            for grad, right in zip(got, grads, strict=True):
                torch.testing.assert_close(grad.double(), right, rtol=tolerance, atol=10 * tolerance)
                assert (right != 0).any() or (distance == "cosine" and d == 1)


@by_distance
def test_any_number_of_threads_gives_the_same_bits(distance):
    x, ref, rows, others, weights = draw(torch.float32, 64, pairs=5000)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            d = pair_distances(x, ref, rows, others, distance=distance)
            found.append((d, *pair_distances_backward(weights, d, x, ref, rows, others, distance=distance)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))


def test_plain_torch_some_pairs_at_a_time(monkeypatch):
    x, ref, rows, others, weights = draw(torch.float64, 5)
    whole = reference.pair_distances(x, ref, rows, others, "euclidean")
    grads = reference.pair_distances_backward(weights, whole, x, ref, rows, others, "euclidean")
    monkeypatch.setattr(sys.modules["deepsim_ext.reference.pair_distances"], "WORKSPACE", 37)
    assert reference.pair_distances(x, ref, rows, others, "euclidean").equal(whole)
    parts = reference.pair_distances_backward(weights, whole, x, ref, rows, others, "euclidean")
    for part, grad in zip(parts, grads, strict=True):
        torch.testing.assert_close(part, grad, rtol=1e-12, atol=1e-12)


@by_distance
def test_many_pairs_of_a_row(distance):
    x, ref, rows, others, weights = draw(torch.float32, 150, pairs=5000)
    d = pair_distances(x, ref, rows, others, distance=distance)
    got = (d, *pair_distances_backward(weights, d, x, ref, rows, others, distance=distance))
    for ours, right in zip(got, exact(x, ref, rows, others, weights, distance), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-5, atol=2e-5 * right.abs().max().item())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_pairs(bad):
    x, ref, rows, others, _ = draw(torch.float32, 5)
    x[20, 2] = bad
    d = pair_distances(x, ref, rows, others)
    assert (rows == 20).any()
    assert (d.isfinite() == (rows != 20)).all()


def test_no_pairs_and_no_rows():
    x, none, no_index = torch.randn(4, 3), torch.randn(0, 3), torch.arange(0)
    for a, b in ((x, x), (none, x), (none, none)):
        d = pair_distances(a, b, no_index, no_index, distance="cosine")
        grads = pair_distances_backward(d, d, a, b, no_index, no_index, distance="cosine")
        assert d.shape == (0,) and [g.shape for g in grads] == [a.shape, b.shape]
        assert all((g == 0).all() for g in grads)


def test_opcheck():
    x, ref, rows, others, weights = draw(torch.float32, 5)
    ops = torch.ops.deepsim_ext
    opcheck(ops.pair_distances.default, (x, ref, rows, others, "euclidean"))
    d = pair_distances(x, ref, rows, others)
    opcheck(ops.pair_distances_backward.default, (weights, d, x, ref, rows, others, "euclidean"))


def test_arguments_that_do_not_go_together_are_refused():
    x, ref, rows, others, weights = draw(torch.float32, 5)
    d = pair_distances(x, ref, rows, others)
    for changes, kind, words in (
        ({"ref_embeddings": ref[:, 1:]}, ValueError, "ref_embeddings must be of shape"),
        ({"ref_embeddings": ref.double()}, TypeError, "ref_embeddings must be"),
        ({"rows": rows[1:]}, ValueError, "ref_rows must be of shape"),
        ({"rows": rows.int()}, TypeError, "rows must be"),
        ({"rows": rows[:, None]}, ValueError, "rows must be of shape"),
        ({"distance": "l2"}, ValueError, "distance must be one of"),
    ):
        arguments = {"embeddings": x, "ref_embeddings": ref, "rows": rows, "ref_rows": others} | changes
        with pytest.raises(kind, match=f"pair_distances: {words}"):
            pair_distances(**arguments)
        with pytest.raises(kind, match=f"pair_distances_backward: {words}"):
            pair_distances_backward(weights, d, **arguments)
    with pytest.raises(ValueError, match="pair_distances_backward: weights must be of shape"):
        pair_distances_backward(weights[1:], d, x, ref, rows, others)
    with pytest.raises(TypeError, match="pair_distances_backward: distances must be"):
        pair_distances_backward(weights, d.double(), x, ref, rows, others)


def test_a_row_that_is_not_there(request):
    x, ref, rows, others, weights = draw(torch.float32, 5)
    d = pair_distances(x, ref, rows, others)
    by_cuda_kernels = request.config.getoption("--emulated") or request.config.getoption("--on-cuda")
    for side, beyond in (("rows", 60), ("rows", -1), ("ref_rows", 45), ("ref_rows", -1)):
        indices = {"rows": rows.clone(), "ref_rows": others.clone()}
        indices["rows"][11], indices["ref_rows"][11] = 4, 2
        indices[side][11] = beyond
        if by_cuda_kernels:  # the pair is NaN, and so is what it pulls at
            found = pair_distances(x, ref, **indices)
            assert found.isnan().nonzero().flatten().tolist() == [11]
            grads = pair_distances_backward(weights, d, x, ref, **indices)
            other = grads[1] if side == "rows" else grads[0]
            assert other.isnan().any(1).nonzero().flatten().tolist() == [2 if side == "rows" else 4]
            continue
        words = rf"{side} must be in \[0, {60 if side == 'rows' else 45}\), got {beyond}$"
        with pytest.raises(IndexError, match=f"pair_distances: {words}"):
            pair_distances(x, ref, **indices)
        with pytest.raises(IndexError, match=f"pair_distances_backward: {words}"):
            pair_distances_backward(weights, d, x, ref, **indices)


def test_an_unknown_distance_in_forward_mode():
    x, ref, rows, others, _ = draw(torch.float32, 5)
    with pytest.raises(ValueError, match="pair_distances: distance must be one of"):
        torch.func.jvp(lambda x: pair_distances(x, ref, rows, others, distance="l2"), (x,), (x,))


@by_distance
def test_its_own_gradient_to_second_order(distance):
    x, ref, rows, others, _ = draw(torch.float64, 3, pairs=12)
    x, ref = (t[10:16].clone().requires_grad_() for t in (x, ref))
    rows, others = rows % 6, others % 6

    def value(x, ref):
        return pair_distances(x, ref, rows, others, distance=distance)

    assert torch.autograd.gradcheck(value, (x, ref)) and torch.autograd.gradgradcheck(value, (x, ref))
    d = value(x, x)  # one tensor on both sides
    (gradient,) = torch.autograd.grad(d.sum(), x)
    (exact,) = torch.autograd.grad(rowwise(x[rows], x[others], distance).sum(), x)
    torch.testing.assert_close(gradient, exact)
