"""Distances of all pairs of a label: brute force, plain torch, and the bits that a search needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import reference
from deepsim_ext.positive_distances import positive_distances
from deepsim_ext.reference.distances import rowwise
from deepsim_ext.semi_hard_negatives import semi_hard_negatives

from .samples import DISTANCES, DTYPES, batch_hard_samples

by_distance = pytest.mark.parametrize("distance", DISTANCES)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@by_distance
def test_values_match_brute_force_and_plain_torch(distance, dtype):
    rounding = 1e-12 if dtype is torch.float64 else 2e-6
    for sample in batch_hard_samples(dtype):
        x, labels, ref, ref_labels = sample.tensors
        others, other_labels = (x, labels) if ref is None else (ref, ref_labels)
        expected = (
            [
                rowwise(row.double(), other.double(), distance).item()
                for i, row in enumerate(x)
                for j, other in enumerate(others)
                if labels[i] == other_labels[j] and (ref is not None or i != j)
            ]
            if len(x) * len(others) < 2500
            else None
        )
        got = positive_distances(*sample.tensors, distance=distance)
        plain = reference.positive_distances(*sample.tensors, None, distance)
        assert got.dtype == plain.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        scale = plain.max().item() if len(plain) else 1.0
        offset = 30 if sample.name == "offset" else 1
        torch.testing.assert_close(got, plain, rtol=10 * rounding, atol=100 * offset * rounding * scale)
        if expected is not None:
            torch.testing.assert_close(
                plain.double(), torch.tensor(expected, dtype=torch.float64), rtol=rounding, atol=rounding
            )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
@by_distance
def test_a_negative_that_equals_a_positive_is_not_farther(distance, dtype):
    """Positives and negatives are copies of the same rows, in other places and in other blocks."""
    g = torch.Generator().manual_seed(8)
    points = torch.randn(70, 37, generator=g, dtype=torch.float64).to(dtype) + 3
    x = torch.randn(50, 37, generator=g, dtype=torch.float64).to(dtype) + 3
    center = torch.full((37,), 0.3 if distance == "cosine" else 3.0, dtype=torch.float64)
    zero, one = (torch.full((n,), k) for n, k in ((50, 0), (70, 1)))
    d = positive_distances(x, zero, points, torch.zeros_like(one), center=center, distance=distance)
    order = torch.randperm(70, generator=g)
    block = points[order]
    begin = torch.arange(51) * 70
    nearest, index, *_ = semi_hard_negatives(x, zero, block, one, begin, d, center=center, distance=distance)
    d, nearest, index = (t.reshape(50, 70) for t in (d, nearest, index))
    # Of all columns that are strictly farther the nearest, of these the first in the block; -1 for none.
    in_block = d[:, order]
    for distance_to, found, chosen in zip(d.T, nearest.T, index.T, strict=True):
        farther = torch.where(in_block > distance_to[:, None], in_block, math.inf)
        expected, first = farther.min(dim=1).values, farther.argmin(dim=1)
        assert torch.equal(found, expected)
        assert torch.equal(chosen.long(), torch.where(expected < math.inf, first, -1))


@by_distance
def test_blocks_have_the_distances_of_the_whole(distance):
    g = torch.Generator().manual_seed(9)
    x, labels = torch.randn(90, 21, generator=g), torch.randint(6, (90,), generator=g)
    center = torch.zeros(21, dtype=torch.float64)
    whole = positive_distances(x, labels, x.clone(), labels, center=center, distance=distance)
    same = labels[:, None] == labels
    matrix = torch.zeros(90, 90).masked_scatter(same, whole)
    for rows, columns in ((slice(0, 40), slice(0, 7)), (slice(33, 90), slice(7, 90))):
        part = positive_distances(
            x[rows], labels[rows], x[columns], labels[columns], center=center, distance=distance
        )
        assert torch.equal(part, matrix[rows, columns][same[rows, columns]])
    other = ~torch.eye(90, dtype=torch.bool)
    alone = positive_distances(x, labels, center=center, distance=distance)
    assert torch.equal(alone, matrix[same & other])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@by_distance
def test_a_nan_or_inf_makes_all_nan(bad, distance):
    x, ref, labels = torch.randn(20, 3), torch.randn(20, 3), torch.arange(20) // 4
    for wrong in (x, ref):
        wrong[5, 1] = bad
        for d in (
            positive_distances(x, labels, ref, labels, distance=distance),
            reference.positive_distances(x, labels, ref, labels, None, distance),
        ):
            assert len(d) == 80 and d.isnan().all()
        wrong[5, 1] = 0


def test_opcheck():
    op = torch.ops.deepsim_ext.positive_distances.default
    x, labels = torch.randn(12, 4), torch.arange(12) // 3
    opcheck(op, (x, labels, None, None, None, "euclidean"))
    opcheck(op, (x, labels, x[:5], labels[:5], torch.zeros(4, dtype=torch.float64), "cosine"))


def test_arguments_that_do_not_go_together_are_refused():
    x, labels = torch.randn(12, 4), torch.arange(12) // 3
    with pytest.raises(ValueError, match=r"positive_distances: labels must be of shape \[12\]"):
        positive_distances(x, labels[1:])
    with pytest.raises(ValueError, match="positive_distances: ref_embeddings must be of shape"):
        positive_distances(x, labels, x[:, 1:], labels)
    with pytest.raises(ValueError, match="positive_distances: center must be of shape"):
        positive_distances(x, labels, center=torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="positive_distances: distance must be one of"):
        positive_distances(x, labels, distance="l2")
