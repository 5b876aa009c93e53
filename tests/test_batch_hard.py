"""Batch-hard mining and triplet loss: the compiled ops against the reference, and every contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

import deepsim_ext
from deepsim_ext import batch_hard_mine, batch_hard_triplet_loss, reference

from .samples import (
    DISTANCES,
    DTYPES,
    FORMS,
    TRIPLET_REDUCTIONS,
    Sample,
    balanced_labels,
    batch_hard_samples,
)

ops = torch.ops.deepsim_ext

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_distance = pytest.mark.parametrize("distance", DISTANCES)

# Of the gradient, against float64 on the same values: rounding of the result to its dtype, and little more.
TOLERANCE = {torch.float32: 5e-7, torch.float64: 1e-12, torch.bfloat16: 5e-3, torch.float16: 5e-3}

# Every margin form and reduction once; gradcheck below goes through all combinations. No margin of 0: where
# both distances are equal, as for cosine in one column, rounding would decide who is active.
SETTINGS = (
    {"margin": 0.1, "reduction": "mean"},
    {"margin": 1.0, "reduction": "mean_nonzero"},
    {"margin": 1.0, "reduction": "none"},
    {"soft": True, "reduction": "sum"},
)


def leaves(tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def assert_gradients_agree(got, exact, rtol, scale=1.0):
    """`scale`, the size of the incoming gradient, tells a gradient that is nothing but float64 rounding.

    Such as every cosine's in one column: what is left of 0 there grows with the incoming gradient.
    """
    assert got.shape == exact.shape
    rounding = 1e-12 * float(scale)
    if exact.norm() <= rounding:
        assert got.double().norm() <= rounding
    else:
        assert (got.double() - exact).norm() <= rtol * exact.norm()


@by_dtype
@by_distance
@pytest.mark.parametrize("i", range(len(list(batch_hard_samples()))))
def test_values_and_gradients_match_the_reference(i, distance, dtype):
    sample = list(batch_hard_samples(dtype))[i]
    for settings in SETTINGS:
        ours = sample.fresh(requires_grad=True)
        exact = [t.double() if t is not None and t.is_floating_point() else t for t in sample.tensors]
        exact = Sample("", exact).fresh(requires_grad=True)
        got = batch_hard_triplet_loss(*ours, distance=distance, return_stats=True, **settings)
        expected = reference.batch_hard_triplet_loss(*exact, distance=distance, return_stats=True, **settings)
        assert got.loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        rtol = 1e-13 if dtype is torch.float64 else 1e-6
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=rtol)
        incoming = torch.randn_like(got.loss)
        gradients = torch.autograd.grad(expected.loss, leaves(exact), incoming.double(), retain_graph=True)
        largest = max((g.abs().max().item() for g in gradients if g.numel()), default=0.0)
        if largest > 1e-9:  # as a gradient scaler does: float16 gradients neither vanish nor overflow
            incoming *= 100 / largest
        got.loss.backward(incoming)
        expected.loss.backward(incoming.double())
        for x, y in zip(leaves(ours), leaves(exact), strict=True):
            assert x.grad.dtype == dtype
            assert_gradients_agree(x.grad, y.grad, TOLERANCE[dtype], incoming.norm())


@by_dtype
@by_distance
def test_mining_matches_the_reference(distance, dtype):
    for sample in batch_hard_samples(dtype):
        got = batch_hard_mine(*sample.tensors, distance=distance)
        for x, y in zip(got, reference.batch_hard_mine(*sample.tensors, distance=distance), strict=True):
            assert x.dtype == torch.int64
            assert torch.equal(x, y), (sample.name, distance)


@by_distance
@pytest.mark.parametrize("soft", [False, True], ids=["margin", "soft"])
@pytest.mark.parametrize("reduction", TRIPLET_REDUCTIONS)
def test_gradcheck_on_the_compiled_op(distance, soft, reduction):
    for sample in batch_hard_samples(small=True):
        tensors = sample.fresh(requires_grad=True)

        def loss(*inputs, tensors=tensors):
            given = iter(inputs)
            arguments = [next(given) if t is not None and t.requires_grad else t for t in tensors]
            return batch_hard_triplet_loss(
                *arguments, margin=2.0, soft=soft, distance=distance, reduction=reduction
            )

        assert torch.autograd.gradcheck(loss, leaves(tensors))
        # In a random direction: what torch's own operations make of the gradient's formula.
        assert torch.autograd.gradgradcheck(loss, leaves(tensors), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(dtype):
    forms = [sample for sample in batch_hard_samples(dtype, small=True) if sample.name in FORMS]
    for sample, distance, reduction in zip(forms, DISTANCES, ("none", "sum", "mean_nonzero"), strict=True):
        x, labels, ref, ref_labels = tensors = sample.fresh(requires_grad=True)
        options = (0.2, reduction == "sum", distance, reduction)
        opcheck(ops.batch_hard_mine.default, (*(t if t is None else t.detach() for t in tensors), distance))
        opcheck(ops.batch_hard_triplet_loss.default, (*tensors, *options))
        with torch.no_grad():
            loss, d_ap, d_an, positives, negatives = ops.batch_hard_triplet_loss(*tensors, *options)
        saved = (x, ref, positives, negatives, d_ap, d_an)
        for with_references in (True, False):
            arguments = (torch.ones_like(loss), *saved, *options, with_references)
            if not with_references:  # who wants no gradient of them does not ask for that of the gradient
                arguments = tuple(a.detach() if a is ref and a is not None else a for a in arguments)
            opcheck(ops.batch_hard_triplet_loss_backward.default, arguments)


@by_distance
@pytest.mark.parametrize("strategies", [{}, {"positive": "easy"}], ids=["hard", "easy"])
def test_the_gradient_of_references_is_formed_only_where_it_is_wanted(distance, strategies):
    """As for a memory of earlier batches. The anchors' gradients are the same, to the bit."""
    g = torch.Generator().manual_seed(8)
    x, ref = (torch.randn(n, 6, generator=g, dtype=torch.float64) for n in (70, 50))
    labels, ref_labels = torch.arange(70) // 5, torch.arange(50) // 4

    def loss(x, ref):
        return batch_hard_triplet_loss(
            x, labels, ref, ref_labels, margin=2.0, distance=distance, **strategies
        )

    found = []
    for wanted in (True, False):
        leaf, others = x.clone().requires_grad_(), ref.clone().requires_grad_(wanted)
        (gradient,) = torch.autograd.grad(loss(leaf, others), leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        found.append((gradient.detach(), second))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    others = ref.clone().requires_grad_()
    loss(x, others).backward()
    assert others.grad.norm() > 0
    for argument, gradient in ((0, found[0][0]), (1, others.grad)):
        torch.testing.assert_close(torch.func.grad(loss, argnums=argument)(x, ref), gradient)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for tensors in ((x.clone().requires_grad_(), ref), (x, ref.clone().requires_grad_())):
        compiled(*tensors).backward()
    assert tensors[0].grad is None and torch.equal(tensors[1].grad, others.grad)


# ---- contracts ---------------------------------------------------------------------------------------------


@by_distance
def test_no_valid_anchor_gives_a_zero_that_is_connected_to_the_input(distance):
    for labels in (torch.zeros(7, dtype=torch.int64), torch.arange(7), torch.zeros(0, dtype=torch.int64)):
        for reduction in ("mean", "mean_nonzero", "sum"):
            x = torch.randn(len(labels), 3, requires_grad=True)
            loss = batch_hard_triplet_loss(x, labels, distance=distance, reduction=reduction)
            loss.backward()
            assert loss.item() == 0
            assert torch.equal(x.grad, torch.zeros_like(x))


@by_dtype
def test_ties_go_to_the_lowest_original_index(dtype):
    """Copies of four points, scattered: each choice has equals in other panels and other threads' squares."""
    g = torch.Generator().manual_seed(3)
    points = torch.randn(4, 20, generator=g).to(dtype)
    which = torch.randint(4, (500,), generator=g)
    labels = which // 2
    first = torch.tensor([(which == w).nonzero()[0].item() for w in range(4)])
    _, positives, negatives = batch_hard_mine(points[which], labels)
    expected = reference.batch_hard_mine(points[which], labels)
    assert torch.equal(positives, expected[1])
    assert torch.equal(negatives, expected[2])
    assert set(negatives.tolist()) <= set(first.tolist())
    assert torch.equal(positives, first[which ^ 1])  # the other point of the label is the farthest


def test_all_embeddings_equal():
    x = torch.ones(300, 8, requires_grad=True)
    labels = balanced_labels(300, 4, torch.Generator().manual_seed(0))
    anchors, positives, negatives = batch_hard_mine(x, labels)
    same = labels[:, None] == labels[None, :]
    assert torch.equal(anchors, torch.arange(300))
    assert torch.equal(positives, (same & ~torch.eye(300, dtype=torch.bool)).int().argmax(1))
    assert torch.equal(negatives, (~same).int().argmax(1))
    for soft in (False, True):
        loss = batch_hard_triplet_loss(x, labels, margin=0.5, soft=soft)
        (gradient,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss.item(), torch.tensor(2.0).log().item() if soft else 0.5)
        assert torch.equal(gradient, torch.zeros_like(x))  # d = 0 everywhere


@by_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["embeddings", "references"])
def test_a_nan_or_inf_makes_the_loss_nan(dtype, bad, where):
    for distance, reduction in itertools.product(DISTANCES, TRIPLET_REDUCTIONS):
        x, ref = torch.randn(40, 6).to(dtype), torch.randn(50, 6).to(dtype)
        (x if where == "embeddings" else ref)[17, 3] = bad
        sets = (x.requires_grad_(), torch.arange(40) // 4)
        if where == "references":
            sets += (ref.requires_grad_(), torch.arange(50) // 4)
        loss = batch_hard_triplet_loss(*sets, distance=distance, reduction=reduction)
        assert loss.isnan().all()
        loss.sum().backward()
        assert x.grad.isnan().any()  # so that a gradient scaler sees it too
        assert [len(t) for t in batch_hard_mine(*sets, distance=distance)] == [0, 0, 0]


@pytest.mark.parametrize("scale", [3e18, 1.2e19, 1e30])
def test_rows_too_long_to_be_squared_are_never_a_silent_number(scale):
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)) * scale
    labels = torch.arange(6) // 2
    loss = batch_hard_triplet_loss(x, labels).double()
    assert loss.isnan() or torch.allclose(loss, reference.batch_hard_triplet_loss(x.double(), labels))
    assert batch_hard_triplet_loss(x / scale * 1e17, labels).isfinite()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(batch_hard_triplet_loss(x, labels), x, create_graph=True)
    if loss.isnan():
        assert torch.autograd.grad(gradient.sum(), x)[0].isnan().all()


def test_selection_is_right_where_the_gram_form_cancels():
    """Unit-scale points 100 away from the origin: |a|^2 + |b|^2 - 2ab has errors of 1e-2 there in float32."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(1500, 16, generator=g) + 100
    labels = balanced_labels(1500, 5, g)
    for got, exact in zip(
        batch_hard_mine(x, labels), reference.batch_hard_mine(x.double(), labels), strict=True
    ):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("d", [3, 128, 1000])
def test_selection_within_the_contracted_gap(d):
    """Where best and runner-up differ by more than 1e-5 of the largest centred squared norm, the index is the
    float64 one; inside that gap the chosen distance is."""
    g = torch.Generator().manual_seed(d)
    x = torch.randn(1200, d, generator=g).mul(torch.rand(1200, 1, generator=g) * 3) + 5
    labels = balanced_labels(1200, 4, g)
    exact = x.double()
    squared = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").square()
    gap = 1e-5 * (exact - exact.mean(0)).square().sum(1).max()
    same = labels[:, None] == labels[None, :]
    anchors, positives, negatives = batch_hard_mine(x, labels)
    assert torch.equal(anchors, torch.arange(1200))
    nearest = squared.masked_fill(same, torch.inf).sort(dim=1)
    farthest = squared.masked_fill(~same, -1).sort(dim=1, descending=True)
    for chosen, order in ((negatives, nearest), (positives, farthest)):
        clear = (order.values[:, 0] - order.values[:, 1]).abs() > gap
        assert clear.float().mean() > 0.5  # or this would test nothing
        assert torch.equal(chosen[clear], order.indices[:, 0][clear])
        assert ((squared[anchors, chosen] - order.values[:, 0]).abs() <= gap).all()


@by_distance
@pytest.mark.parametrize("references", [False, True], ids=["self", "references"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_selection_within_heaps_that_are_far_apart(dtype, references, distance):
    """Between neighbours in a heap, |a|^2 + |b|^2 - 2ab has no correct digit in float32."""
    g = torch.Generator().manual_seed(8)
    labels = torch.arange(400) // 5
    heap = torch.randn(2, 16, generator=g) * (1e4 if distance != "cosine" else 1e3)
    x = (torch.randn(400, 16, generator=g) + heap[labels % 2]).to(dtype)
    order = torch.randperm(400, generator=g)
    x, labels = x[order], labels[order]
    sets = (x, labels, x.clone(), labels) if references else (x, labels)
    exact = reference.distances.pairwise(x.double(), x.double(), distance)
    same = labels[:, None] == labels
    others = same if references else same & ~torch.eye(400, dtype=torch.bool)
    anchors, positives, negatives = batch_hard_mine(*sets, distance=distance)
    assert torch.equal(anchors, torch.arange(400))
    for chosen, best in (
        (positives, exact.masked_fill(~others, -1).amax(1)),
        (negatives, exact.masked_fill(same, torch.inf).amin(1)),
    ):
        torch.testing.assert_close(exact[anchors, chosen], best, rtol=1e-3, atol=0)
    assert others[anchors, positives].all() and not same[anchors, negatives].any()


@by_distance
@pytest.mark.parametrize("references", [False, True], ids=["self", "references"])
def test_selection_where_only_some_anchors_lose_their_digits(references, distance):
    """A class in a heap of its own, so that its positives are close; near copies in other classes, so that
    negatives are. Both at once for none, and the other rows far from each other."""
    g = torch.Generator().manual_seed(9)
    labels = torch.arange(300) // 6
    labels[250:] = 41  # a large class
    x = torch.randn(300, 16, generator=g)
    x[250:] = 9 * torch.randn(16, generator=g) + 1e-3 * torch.randn(50, 16, generator=g)
    for row, copied in ((3, 100), (101, 40), (240, 5)):
        x[row] = x[copied] + 1e-4 * torch.randn(16, generator=g)
    order = torch.randperm(300, generator=g)
    x, labels = x[order], labels[order]
    sets = (x, labels, x[:200].clone(), labels[:200]) if references else (x, labels)
    ref, ref_labels = (x[:200], labels[:200]) if references else (x, labels)
    exact = reference.distances.pairwise(x.double(), ref.double(), distance)
    same = labels[:, None] == ref_labels
    others = same if references else same & ~torch.eye(300, dtype=torch.bool)
    anchors, positives, negatives = batch_hard_mine(*sets, distance=distance)
    assert len(anchors) > 250
    for chosen, best in (
        (positives, exact.masked_fill(~others, -1).amax(1)),
        (negatives, exact.masked_fill(same, torch.inf).amin(1)),
    ):
        torch.testing.assert_close(exact[anchors, chosen], best[anchors], rtol=1e-4, atol=0)
    assert others[anchors, positives].all() and not same[anchors, negatives].any()


@pytest.mark.parametrize("d", [128, 384, 2048])
def test_selection_on_a_line(d):
    """Where all terms of a product have one sign, and sums that are cut off fall short by the most they can.

    Of each class one row lies between a row near the centre and one far out. The former is farther from it,
    but by little more than the contract's gap; products with the latter are large, with the former tiny.
    """
    g = torch.Generator().manual_seed(d)
    between = 0.4 + 0.1 * torch.rand(60, generator=g, dtype=torch.float64)
    outer = 2 * between
    inner = -1.5e-5 * outer.square().max() / (2 * between)
    side = torch.tensor([1.0, -1.0]).repeat(30)
    direction = torch.randn(d, generator=g, dtype=torch.float64)
    x = (torch.cat([side * between, side * inner, side * outer])[:, None] * direction).float()
    anchors, positives, _ = batch_hard_mine(x, torch.arange(60).repeat(3))
    assert torch.equal(anchors, torch.arange(180))
    assert torch.equal(positives[:60], torch.arange(60, 120))


def test_self_pairs_are_excluded_only_in_the_self_form():
    x, labels = torch.randn(20, 4), torch.arange(20) // 2
    _, positives, _ = batch_hard_mine(x, labels)
    assert torch.equal(positives, torch.arange(20) ^ 1)
    assert torch.equal(batch_hard_mine(x, labels, x, labels)[1], positives)
    singles = torch.arange(20)
    assert len(batch_hard_mine(x, singles, x, singles)[0]) == 0
    assert torch.equal(
        batch_hard_mine(x, singles, x.clone(), singles)[1], singles
    )  # itself is the only positive


def test_gradient_flows_to_both_sets_and_only_where_asked():
    x, ref = torch.randn(12, 4, requires_grad=True), torch.randn(15, 4)
    labels, ref_labels = torch.arange(12) // 3, torch.arange(15) // 3
    batch_hard_triplet_loss(x, labels, ref, ref_labels).backward()
    assert x.grad.abs().sum() > 0
    assert ref.grad is None
    frozen = batch_hard_triplet_loss(x.detach(), labels, ref.requires_grad_(), ref_labels)
    frozen.backward()
    assert ref.grad.abs().sum() > 0


def test_statistics_are_detached_and_right():
    x = torch.tensor([[0.0], [1.0], [3.0], [10.0]], requires_grad=True)
    result = batch_hard_triplet_loss(x, torch.tensor([0, 0, 1, 2]), margin=1.5, return_stats=True)
    assert isinstance(result, deepsim_ext.TripletLossResult)
    # Anchor 0: positive 1 away, negative 3. Anchor 1: 1 and 2. Rows 2 and 3 have no positive.
    assert result.valid_anchors.item() == result.triplets.item() == 2
    assert result.active_triplets.item() == 1
    assert result.active_fraction.item() == 0.5
    assert result.mean_d_ap.item() == 1.0
    assert result.mean_d_an.item() == 2.5
    assert result.loss.item() == 0.25
    assert not any(t.requires_grad for t in result[1:])


def test_soft_losses_that_vanish_are_not_active():
    x = torch.tensor([[0.0], [0.1], [500.0], [500.1]])
    for f in (batch_hard_triplet_loss, reference.batch_hard_triplet_loss):
        result = f(x, torch.tensor([0, 0, 1, 1]), soft=True, return_stats=True)
        assert result.loss.item() == 0
        assert result.active_triplets.item() == result.active_fraction.item() == 0


def test_softplus_neither_overflows_nor_vanishes():
    x = torch.tensor([[0.0], [1000.0], [1.0]], requires_grad=True)
    loss = batch_hard_triplet_loss(x, torch.tensor([0, 0, 1]), soft=True, reduction="none")
    assert loss.tolist() == [999.0, pytest.approx(1.3132617), 0.0]  # gaps 1000 - 1 and 1000 - 999
    gaps = torch.tensor([[0.0], [0.5], [20.5]], dtype=torch.float64)
    loss = batch_hard_triplet_loss(gaps, torch.tensor([0, 0, 1]), soft=True, reduction="none")
    assert loss[0].item() == pytest.approx(2.0611536e-09, rel=1e-6)


def test_half_precision_is_computed_in_float32():
    """Values whose squares overflow float16."""
    x = (torch.randn(64, 32) * 3000).to(torch.float16).requires_grad_()
    labels = torch.arange(64) // 4
    loss = batch_hard_triplet_loss(x, labels, reduction="sum")
    loss.backward()
    exact = reference.batch_hard_triplet_loss(x.detach().double(), labels, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert x.grad.dtype == torch.float16
    assert x.grad.isfinite().all()


def test_many_reference_rows_for_one_anchor_and_the_reverse():
    g = torch.Generator().manual_seed(1)
    for n, m in ((1, 700), (700, 1), (3, 65)):
        sample = Sample(
            "",
            [
                torch.randn(n, 9, generator=g),
                torch.arange(n) % 3,
                torch.randn(m, 9, generator=g),
                torch.arange(m) % 3,
            ],
        )
        for got, expected in zip(
            batch_hard_mine(*sample.tensors), reference.batch_hard_mine(*sample.tensors), strict=True
        ):
            assert torch.equal(got, expected)


@by_distance
def test_a_row_that_everybody_chooses(distance):
    """Its gradient is a sum over more anchors than one warp of a GPU has lanes, several times over."""
    direction = torch.nn.functional.normalize(torch.randn(150, 200, dtype=torch.float64) + 0.3)
    middle = direction.mean(0, keepdim=True)
    exact = torch.cat([middle, direction, -middle]).requires_grad_()
    labels = torch.tensor([0] + [1] * 150 + [0])
    x = exact.detach().float().requires_grad_()
    anchors, _, negatives = batch_hard_mine(x, labels, distance=distance)
    assert (negatives[labels[anchors] == 1] == 0).all()
    options = {"margin": 3.0, "distance": distance, "reduction": "sum"}
    batch_hard_triplet_loss(x, labels, **options).backward()
    reference.batch_hard_triplet_loss(exact, labels, **options).backward()
    assert_gradients_agree(x.grad, exact.grad, TOLERANCE[torch.float32])


@by_distance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tensors_that_a_call_makes_take_at_most_64_bytes_a_row(dtype, distance, monkeypatch):
    """Beyond the gradient or, before there is one, a packed copy of the input."""
    # So few rows CUDA would search by differences, with a few hundred KiB that do not grow with the batch.
    monkeypatch.setenv("DEEPSIM_CUDA_MINING", "mma")
    n, d = 1024, 32
    x, labels = torch.randn(n, d).to(dtype).requires_grad_(), balanced_labels(n, 4)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        (gradient,) = torch.autograd.grad(batch_hard_triplet_loss(x, labels, distance=distance), x)
    changes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = max(itertools.accumulate(changes))
    packed = n * 128  # float32 on the CPU, chunks of 128 bytes on CUDA
    assert gradient.nbytes <= peak <= packed + 64 * n + 4096
    assert sum(changes) == gradient.nbytes


def test_unused_reference_labels_in_the_self_form():
    x, labels = torch.randn(9, 2), torch.arange(9) // 3
    assert torch.equal(batch_hard_triplet_loss(x, labels, x, labels), batch_hard_triplet_loss(x, labels))
