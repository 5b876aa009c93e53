"""What a block adds to batch-all, for given lists of positives: brute force, plain torch, every contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import reference
from deepsim_ext.batch_all_negatives import batch_all_negatives
from deepsim_ext.reference import given_lists
from deepsim_ext.reference.distances import rowwise

from .test_semi_hard_negatives import block, blocks, by_distance, by_dtype, exact_distances, refusals, scaled

by_form = pytest.mark.parametrize("semi_hard", [False, True], ids=["all", "semi_hard"])

MARGIN = {"euclidean": 0.7, "sqeuclidean": 3.0, "cosine": 0.1}


def samples(dtype, distance):
    """Without lists of limits, which are no distances, and with as many triplets as brute force likes."""
    for name, b in blocks(dtype).items():
        if name not in ("limits", "unreachable"):
            yield name, scaled(b, distance)


def brute_force(b, margin, semi_hard, distance):
    """The op's results in float64: over triplets listed one by one, gradients by autograd."""
    d, negative = exact_distances(b, distance)
    sums, active = torch.zeros(4, dtype=torch.float64), torch.zeros(len(b.positives), dtype=torch.float64)
    weight = torch.zeros_like(d)
    for a in range(len(d)):
        lists = b.positives[b.begin[a] : b.begin[a + 1]].double()[:, None]
        counted = negative[a] & ((d[a] > lists) & (d[a] <= lists + margin) if semi_hard else True)
        counted = counted.expand(len(lists), d.shape[1])
        with_loss = counted & (d[a] < lists + margin)
        sums += torch.stack(
            [t.sum().double() for t in (counted, with_loss, counted * d[a], with_loss * d[a])]
        )
        active[b.begin[a] : b.begin[a + 1]] = with_loss.sum(dim=1).double()
        weight[a] = with_loss.sum(dim=0)
    leaves = [t.double().detach().requires_grad_() for t in (b.embeddings, b.ref_embeddings)]
    loss = -(weight * rowwise(leaves[0][:, None], leaves[1][None], distance)).sum()
    return sums, active, *torch.autograd.grad(loss, leaves)


@by_dtype
@by_distance
@by_form
def test_values_match_brute_force(semi_hard, distance, dtype):
    margin = MARGIN[distance]
    for name, b in samples(dtype, distance):
        sums, active, grad, grad_ref = batch_all_negatives(
            *b, margin=margin, semi_hard=semi_hard, distance=distance
        )
        exact = brute_force(b, margin, semi_hard, distance)
        assert (
            sums.dtype == torch.float64 and active.dtype == grad.dtype == grad_ref.dtype == b.positives.dtype
        )
        if dtype is torch.float64:
            assert torch.equal(sums[:2], exact[0][:2]) and torch.equal(active, exact[1]), name
            rounding = 1e-10
        else:  # a triplet within rounding of the margin may be on its other side: of many some are
            assert ((sums[:2] - exact[0][:2]).abs() <= 1e-4 * exact[0][:2] + 2).all(), name
            assert (active - exact[1]).abs().max().item() <= 2 if len(active) else True, name
            rounding = 1e-2
        torch.testing.assert_close(
            sums[2:], exact[0][2:], rtol=1e-12 if rounding < 1e-9 else 1e-3, atol=10 * rounding
        )
        for x, y in ((grad, exact[2]), (grad_ref, exact[3])):
            assert (x.double() - y).norm() <= rounding * (y.norm() + 1e-2), name


@by_form
@by_distance
def test_the_sum_over_blocks_is_that_of_all(distance, semi_hard):
    options = {"margin": MARGIN[distance], "semi_hard": semi_hard, "distance": distance}
    for _, b in samples(torch.float64, distance):
        whole = batch_all_negatives(*b, **options)
        cuts = [0, len(b.ref_labels) // 5, len(b.ref_labels) // 2, len(b.ref_labels)]
        parts = [
            batch_all_negatives(*b.of(slice(*ends)), **options) for ends in zip(cuts, cuts[1:], strict=False)
        ]
        for k in range(3):
            torch.testing.assert_close(sum(part[k] for part in parts), whole[k], rtol=1e-11, atol=1e-10)
        torch.testing.assert_close(torch.cat([part[3] for part in parts]), whole[3], rtol=1e-11, atol=1e-10)


@by_dtype
@by_distance
@by_form
def test_plain_torch_adds_the_same_in_stripes(semi_hard, distance, dtype, monkeypatch):
    monkeypatch.setattr(given_lists, "WORKSPACE", 1000)
    for name, b in samples(dtype, distance):
        arguments = (*b, MARGIN[distance], semi_hard, None, distance, True)
        got = torch.ops.deepsim_ext.batch_all_negatives(*arguments)
        plain = reference.batch_all_negatives(*arguments)
        rounding = 1e-10 if dtype is torch.float64 else 1e-2
        for x, y in zip(got, plain, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
            assert (x.double() - y.double()).norm() <= rounding * (y.double().norm() + 1), name
        if dtype is torch.float64:
            assert torch.equal(got[0][:2], plain[0][:2]) and torch.equal(got[1], plain[1]), name


@pytest.mark.parametrize("semi_hard", [False, True], ids=["all", "semi_hard"])
@pytest.mark.parametrize("longest", [40, 70])  # compared one by one, and searched
def test_whole_numbers_are_counted_exactly(longest, semi_hard):
    """d_an = d_ap and d_an = d_ap + margin lie outside of what is active; the latter is looked at."""
    g = torch.Generator().manual_seed(4)
    b = block(90, 120, 2, 4, longest, torch.float32)
    x, refs = (torch.randint(-3, 4, (k, 2), generator=g).float() + 50 for k in (90, 120))
    squares = torch.randint(40, b.positives.shape, generator=g).float()
    b = b._replace(embeddings=x, ref_embeddings=refs, positives=squares)
    sums, active, grad, grad_ref = batch_all_negatives(
        *b, margin=3.0, semi_hard=semi_hard, distance="sqeuclidean"
    )
    exact = brute_force(b, 3.0, semi_hard, "sqeuclidean")
    assert torch.equal(sums, exact[0]) and torch.equal(active.double(), exact[1])
    assert torch.equal(grad.double(), exact[2]) and torch.equal(grad_ref.double(), exact[3])


@by_form
def test_gradients_only_where_they_are_wanted(semi_hard):
    b = block(30, 40, 5, 3, 9)
    whole = batch_all_negatives(*b, margin=1.0, semi_hard=semi_hard)
    for call in (batch_all_negatives, None):
        if call:
            part = call(*b, margin=1.0, semi_hard=semi_hard, with_gradient=False)
        else:
            part = reference.batch_all_negatives(*b, 1.0, semi_hard, None, "euclidean", False)
        torch.testing.assert_close(part[0], whole[0], rtol=1e-12, atol=0)
        assert torch.equal(part[1], whole[1])
        assert part[2].shape == part[3].shape == (0, 5)


@by_distance
@pytest.mark.parametrize("search", ["compiled", "plain"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_what_cannot_be_compared_is_nan(bad, search, distance):
    op = reference.batch_all_negatives if search == "plain" else torch.ops.deepsim_ext.batch_all_negatives
    b = scaled(block(40, 50, 6, 5, 6, torch.float32), distance)
    for argument in ("embeddings", "ref_embeddings", "positives"):
        wrong = getattr(b, argument).clone()
        wrong[17] = bad
        result = op(*b._replace(**{argument: wrong}), 0.5, False, None, distance, True)
        if bad == 3e38 and distance == "cosine" and argument != "positives":
            assert all(t.isfinite().all() for t in result)
        else:
            assert all(t.isnan().all() for t in result)


@pytest.mark.parametrize("margin", [0.0, 1e30, 1e300])
@by_form
def test_margins_beyond_every_distance(margin, semi_hard):
    b = block(30, 40, 5, 3, 60, torch.float32)
    got = batch_all_negatives(*b, margin=margin, semi_hard=semi_hard)
    plain = reference.batch_all_negatives(*b, margin, semi_hard, None, "euclidean", True)
    for x, y in zip(got, plain, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


@by_form
def test_the_same_bits_for_any_number_of_threads(semi_hard):
    threads = torch.get_num_threads()
    for b in (block(300, 700, 30, 9, 20, torch.float32), block(200, 300, 8, 3, 90, torch.float32)):
        found = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(batch_all_negatives(*b, margin=1.0, semi_hard=semi_hard))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(dtype):
    op = torch.ops.deepsim_ext.batch_all_negatives.default
    opcheck(op, (*block(9, 12, 4, 3, 5, dtype), 0.5, True, None, "cosine", True))
    center = torch.zeros(4, dtype=torch.float64)
    opcheck(op, (*block(9, 0, 4, 3, 5, dtype), 0.5, False, center, "euclidean", False))


def test_arguments_that_do_not_go_together_are_refused():
    b = block(20, 30, 4, 3, 5, torch.float32)
    for kind, words, wrong in refusals(b):
        with pytest.raises(kind, match=f"batch_all_negatives: {words}"):
            batch_all_negatives(*wrong, margin=0.5)
    with pytest.raises(ValueError, match="center must be"):
        batch_all_negatives(*b, margin=0.5, center=torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="distance must be one of"):
        batch_all_negatives(*b, margin=0.5, distance="l2")
