"""The hardest pairs of a block for the rows of both sides: the kernel and plain torch against brute force."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import reference
from deepsim_ext.batch_hard_extremes import Extremes, batch_hard_extremes
from deepsim_ext.reference.distances import pairwise

from .samples import DISTANCES, DTYPES, batch_hard_samples

by_distance = pytest.mark.parametrize("distance", DISTANCES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def both(x, labels, ref, ref_labels, distance, center=None):
    """By the op and in plain torch; the centre is the mean if none is given."""
    if center is None:
        rows = x if ref is None else torch.cat([x, ref])
        center = torch.zeros(x.shape[1], dtype=torch.float64)
        if distance != "cosine" and len(rows):
            center = rows.double().mean(dim=0)
    arguments = x, labels, ref, ref_labels
    yield batch_hard_extremes(*arguments, center=center, distance=distance)
    yield Extremes(*reference.batch_hard_extremes(*arguments, center, distance))


def brute_force(x, labels, ref, ref_labels, distance):
    """Half squares [2, N] of positives and negatives, -inf and inf where there is none, and all of them."""
    others, other_labels = (x, labels) if ref is None else (ref, ref_labels)
    d = pairwise(x.double(), others.double(), distance if distance == "cosine" else "sqeuclidean")
    half = d if distance == "cosine" else d / 2
    same = labels[:, None] == other_labels
    positive = same.clone()
    if ref is None:
        positive.fill_diagonal_(False)
    farthest = torch.where(positive, half, -math.inf)
    nearest = torch.where(same, math.inf, half)
    nobody = half.new_full((len(x), 1), math.inf)
    farthest, nearest = torch.cat([farthest, -nobody], dim=1), torch.cat([nearest, nobody], dim=1)
    return torch.stack([farthest.amax(dim=1), nearest.amin(dim=1)]), torch.stack([farthest, nearest])


@by_dtype
@by_distance
def test_values_and_whom_they_are_of(distance, dtype):
    compared = 0
    for s in batch_hard_samples(dtype):
        x, labels, ref, ref_labels = s.tensors
        for got in both(*s.tensors, distance):
            sides = [(got[:2], s.tensors)]
            if ref is not None:
                sides.append((got[3:], (ref, ref_labels, x, labels)))
            else:
                assert got.ref_half_squares.shape == got.ref_indices.shape == (2, 0)
            for (values, indices), arguments in sides:
                expected, of_all = brute_force(*arguments, distance)
                assert values.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
                assert indices.dtype == torch.int32
                assert torch.equal(indices == -1, expected.isinf()), s.name
                # Tiles have lost digits where rows are near each other and far from the centre.
                scale = max(1.0, got.half_norms.max().item()) if len(got.half_norms) else 1.0
                tolerance = 1e-12 if dtype is torch.float64 else 1e-5
                torch.testing.assert_close(values.double(), expected, rtol=tolerance, atol=tolerance * scale)
                last = of_all.shape[2] - 1
                chosen = of_all.gather(2, indices.long().where(indices >= 0, last)[..., None])[..., 0]
                torch.testing.assert_close(chosen, expected, rtol=tolerance, atol=tolerance * scale)
                compared += int((indices >= 0).sum())
    assert compared > 1000


@pytest.mark.parametrize("self_form", [True, False])
def test_the_lowest_index_of_equals(self_form):
    """Whole numbers: their distances have no rounding, and most of them are equal."""
    g = torch.Generator().manual_seed(4)
    x, ref = (torch.randint(-1, 2, (n, 3), generator=g).float() for n in (150, 170))
    labels, ref_labels = (torch.randint(7, (n,), generator=g) for n in (150, 170))
    if self_form:
        ref = ref_labels = None
    for got in both(x, labels, ref, ref_labels, "sqeuclidean", torch.ones(3, dtype=torch.float64)):
        sides = [(got[:2], (x, labels, ref, ref_labels))]
        if not self_form:
            sides.append((got[3:], (ref, ref_labels, x, labels)))
        for (_, indices), arguments in sides:
            expected, of_all = brute_force(*arguments, "sqeuclidean")
            first = (of_all == expected[..., None]).int().argmax(dim=2)
            assert torch.equal(indices.long(), torch.where(expected.isinf(), -1, first))


@by_dtype
@by_distance
@pytest.mark.parametrize("depth", [20, 400])
def test_a_pair_is_worth_the_same_in_every_block(depth, distance, dtype):
    """To the bit, whichever of the two is an anchor: so ranks choose what one process chooses."""
    g = torch.Generator().manual_seed(6)
    x, labels = torch.randn(210, depth, generator=g).to(dtype), torch.randint(30, (210,), generator=g)
    center = torch.randn(depth, generator=g).double() / 10
    whole = batch_hard_extremes(x, labels, center=center, distance=distance)
    first, second = slice(0, 80), slice(80, 210)
    alone = batch_hard_extremes(x[first], labels[first], center=center, distance=distance)
    pair = x[first], labels[first], x[second], labels[second]
    met = batch_hard_extremes(*pair, center=center, distance=distance)
    turned = batch_hard_extremes(*pair[2:], *pair[:2], center=center, distance=distance)
    assert torch.equal(met.half_squares, turned.ref_half_squares)
    assert torch.equal(met.ref_half_squares, turned.half_squares)
    assert torch.equal(met.indices, turned.ref_indices) and torch.equal(met.ref_indices, turned.indices)
    assert torch.equal(alone.half_norms, whole.half_norms[first])
    positives, negatives = torch.stack([alone.half_squares, met.half_squares], dim=1)
    best = torch.stack([positives.amax(dim=0), negatives.amin(dim=0)])
    assert torch.equal(best, whole.half_squares[:, first])


def test_plain_torch_a_few_rows_at_a_time(monkeypatch):
    g = torch.Generator().manual_seed(5)
    x, ref = (torch.randint(-1, 2, (n, 3), generator=g).float() for n in (60, 70))
    labels, ref_labels = (torch.randint(5, (n,), generator=g) for n in (60, 70))
    center = torch.zeros(3, dtype=torch.float64)
    for block in ((x, labels, None, None), (x, labels, ref, ref_labels)):
        whole = reference.batch_hard_extremes(*block, center, "euclidean")
        module = sys.modules["deepsim_ext.reference.batch_hard_extremes"]
        monkeypatch.setattr(module, "WORKSPACE", 70 * 7)
        for part, right in zip(
            reference.batch_hard_extremes(*block, center, "euclidean"), whole, strict=True
        ):
            assert torch.equal(part, right)
        monkeypatch.undo()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@by_distance
def test_a_nan_or_inf_makes_all_nan(bad, distance):
    x, ref, labels = torch.randn(20, 3), torch.randn(20, 3), torch.arange(20) // 4
    for wrong in (x, ref):
        wrong[5, 1] = bad
        for got in both(x, labels, ref, labels, distance):
            for values, indices in (got[:2], got[3:]):
                assert values.isnan().all() and (indices == -1).all()
        wrong[5, 1] = 0


def test_opcheck():
    op = torch.ops.deepsim_ext.batch_hard_extremes.default
    x, labels = torch.randn(12, 4), torch.arange(12) // 3
    center = torch.zeros(4, dtype=torch.float64)
    opcheck(op, (x, labels, None, None, center, "euclidean"))
    opcheck(op, (x.double(), labels, x[:5].double(), labels[:5], center, "cosine"))


def test_arguments_that_do_not_go_together_are_refused():
    x, labels, center = torch.randn(12, 4), torch.arange(12) // 3, torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"batch_hard_extremes: labels must be of shape \[12\]"):
        batch_hard_extremes(x, labels[1:], center=center)
    with pytest.raises(ValueError, match="batch_hard_extremes: ref_embeddings must be of shape"):
        batch_hard_extremes(x, labels, x[:, 1:], labels, center=center)
    with pytest.raises(ValueError, match="batch_hard_extremes: center must be of shape"):
        batch_hard_extremes(x, labels, center=center[1:])
    with pytest.raises(TypeError, match="batch_hard_extremes: center must be"):
        batch_hard_extremes(x, labels, center=center.float())
    with pytest.raises(ValueError, match="batch_hard_extremes: distance must be one of"):
        batch_hard_extremes(x, labels, center=center, distance="l2")
