"""Hard, easy and semi-hard positives and negatives: brute force, the reference, and every contract."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import batch_hard_mine, batch_hard_triplet_loss, reference
from deepsim_ext.reference.distances import pairwise

from .samples import (
    DISTANCES,
    DTYPES,
    FORMS,
    TRIPLET_REDUCTIONS,
    Sample,
    balanced_labels,
    batch_hard_samples,
)
from .test_batch_hard import SETTINGS, TOLERANCE, assert_gradients_agree, leaves

ops = torch.ops.deepsim_ext

STRATEGIES = [
    (positive, negative)
    for positive, negative in itertools.product(("hard", "easy", "semihard"), repeat=2)
    if not positive == negative == "semihard"
]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_distance = pytest.mark.parametrize("distance", DISTANCES)
by_strategies = pytest.mark.parametrize(
    ("positive", "negative"), STRATEGIES, ids=["-".join(pair) for pair in STRATEGIES]
)


def samples(dtype: torch.dtype = torch.float64, small: bool = False) -> list[Sample]:
    # Cosine distances in one column are all 0 or 2: rounding alone says which of two is larger.
    return [s for s in batch_hard_samples(dtype, small) if s.name != "one_column"]


def clusters(labels: torch.Tensor, d: int, g: torch.Generator) -> torch.Tensor:
    """Rows nearer to their own label than random ones, so that semi-hard positives are there to be found."""
    centers = torch.randn(int(labels.max()) + 1, d, generator=g)
    return centers[labels] + 0.7 * torch.randn(len(labels), d, generator=g)


def distance_of(a: list[float], b: list[float], distance: str) -> float:
    if distance != "cosine":
        squared = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        return math.sqrt(squared) if distance == "euclidean" else squared
    lengths = math.hypot(*a), math.hypot(*b)
    if 0 in lengths:
        return 1.0
    return sum((p / lengths[0] - q / lengths[1]) ** 2 for p, q in zip(a, b, strict=True)) / 2


def first_by(d: list[float], among: list[int], sign: int) -> int | None:
    """Of the rows `among` some the farthest (sign -1) or nearest (1), of equals the lowest."""
    return min(among, key=lambda j: (sign * d[j], j), default=None)


def brute_force(tensors, positive: str, negative: str, distance: str) -> list[list[int]]:
    """Anchors, positives and negatives, by loops over Python's floats."""
    x, labels, ref, ref_labels = (None if t is None else t.tolist() for t in tensors)
    own = ref is None
    refs, ref_labels = (x, labels) if own else (ref, ref_labels)
    found = []
    for a, row in enumerate(x):
        d = [distance_of(row, other, distance) for other in refs]
        positives = [j for j, label in enumerate(ref_labels) if label == labels[a] and not (own and j == a)]
        negatives = [j for j, label in enumerate(ref_labels) if label != labels[a]]

        p = first_by(d, positives, 1 if positive == "easy" else -1)
        n = first_by(d, negatives, -1 if negative == "easy" else 1)
        if positive == "semihard" and n is not None:
            p = first_by(d, [j for j in positives if d[j] < d[n]], -1)
        if negative == "semihard" and p is not None:
            n = first_by(d, [j for j in negatives if d[j] > d[p]], 1)
        if p is not None and n is not None:
            found.append((a, p, n))
    return [list(column) for column in zip(*found, strict=True)] or [[], [], []]


@by_dtype
@by_distance
@by_strategies
def test_mining_matches_brute_force_and_the_reference(positive, negative, distance, dtype):
    options = {"positive": positive, "negative": negative, "distance": distance}
    for sample in samples(dtype):
        got = batch_hard_mine(*sample.tensors, **options)
        expected = reference.batch_hard_mine(*sample.tensors, **options)
        assert all(t.dtype == torch.int64 for t in got)
        if len(sample.tensors[0]) <= 60:
            assert [t.tolist() for t in got] == brute_force(sample.tensors, *options.values()), sample.name
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), sample.name
            continue
        assert torch.equal(got[0], expected[0]), sample.name
        x, _, ref, _ = (t.double() if t is not None else t for t in sample.tensors)
        d = pairwise(x, x if ref is None else ref, distance)
        # That of float32, which may decide where rows are many, also on which side of the other one's
        # distance a semi-hard choice is.
        rounding = 0 if dtype is torch.float64 else 1e-6
        strategies, borders = (positive, negative), (got[2], got[1])
        for a, b, strategy, border in zip(got[1:], expected[1:], strategies, borders, strict=True):
            one, other, limit = d[got[0], a], d[got[0], b], d[got[0], border]
            if strategy == "semihard":
                on_border = torch.minimum((one - limit).abs(), (other - limit).abs()) < rounding * limit
                one = torch.where(on_border, other, one)
            torch.testing.assert_close(one, other, rtol=rounding, atol=0)


@by_distance
@by_strategies
def test_the_op_says_minus_one_where_an_anchor_is_not_valid(positive, negative, distance):
    for sample in samples():
        positives, negatives = ops.mine_triplets(*sample.tensors, positive, negative, distance)
        assert positives.dtype == negatives.dtype == torch.int32
        anchors, p, n = reference.batch_hard_mine(
            *sample.tensors, positive=positive, negative=negative, distance=distance
        )
        for got, expected in ((positives, p), (negatives, n)):
            whole = torch.full(sample.tensors[0].shape[:1], -1)
            assert torch.equal(got.long(), whole.index_put((anchors,), expected)), sample.name


@by_distance
def test_hardest_of_both_go_through_the_ops_of_batch_hard(distance):
    for sample in samples(torch.float32):
        expected = ops.batch_hard_mine(*sample.tensors, distance)
        got = ops.mine_triplets(*sample.tensors, "hard", "hard", distance)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), sample.name
    x, labels = torch.randn(12, 3), torch.arange(12) // 3
    with torch.profiler.profile() as profile:
        batch_hard_mine(x, labels, distance=distance)
        batch_hard_triplet_loss(x, labels, distance=distance)
    called = {event.name for event in profile.events() if event.name.startswith("deepsim_ext::")}
    assert {"deepsim_ext::batch_hard_mine", "deepsim_ext::batch_hard_triplet_loss"} <= called
    assert not {"deepsim_ext::mine_triplets", "deepsim_ext::mined_triplet_loss"} & called


@by_dtype
@by_distance
@by_strategies
def test_values_statistics_and_gradients_match_the_reference(positive, negative, distance, dtype):
    """Gradients those of the triplets that were chosen: where rounding decides, the reference has another."""
    rtol = 1e-13 if dtype is torch.float64 else 1e-6
    few_rows = [s for s in samples(dtype) if len(s.tensors[0]) <= 150]
    for sample, settings in zip(few_rows, itertools.cycle(SETTINGS)):
        strategies = {"positive": positive, "negative": negative, "distance": distance}
        options = strategies | settings
        ours = sample.fresh(requires_grad=True)
        exact = [t.double() if t is not None and t.is_floating_point() else t for t in sample.tensors]
        exact = Sample("", exact).fresh(requires_grad=True)
        got = batch_hard_triplet_loss(*ours, return_stats=True, **options)
        expected = reference.batch_hard_triplet_loss(*exact, return_stats=True, **options)
        chosen = ops.mine_triplets(*sample.tensors, *strategies.values())
        settings = {"margin": 0.2, "soft": False} | settings
        loss = reference.indexed_triplet_loss(exact[0], exact[2], *chosen, distance=distance, **settings)
        assert got.loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        assert not any(t.requires_grad for t in got[1:])
        # Of large distances, which nearly cancel; the slope of a soft loss is exponential in what is left.
        atol = rtol * (1 + expected.mean_d_ap.item() + expected.mean_d_an.item())
        for x, y in zip((*got, got.loss), (*expected, loss), strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=atol)
        incoming = torch.randn_like(got.loss)
        gradients = torch.autograd.grad(loss, leaves(exact), incoming.double(), retain_graph=True)
        largest = max((g.abs().max().item() for g in gradients if g.numel()), default=0.0)
        if largest > 1e-9:  # as a gradient scaler does: float16 gradients neither vanish nor overflow
            incoming *= 100 / largest
        got.loss.backward(incoming)
        loss.backward(incoming.double())
        for x, y in zip(leaves(ours), leaves(exact), strict=True):
            assert x.grad.dtype == dtype
            assert_gradients_agree(x.grad, y.grad, TOLERANCE[dtype] + atol, 1 + incoming.norm())


@by_distance
@by_strategies
def test_gradcheck_on_the_compiled_op(positive, negative, distance):
    forms = zip(
        samples(small=True), itertools.cycle(TRIPLET_REDUCTIONS), itertools.cycle((False, True, True))
    )
    for sample, reduction, soft in forms:
        tensors = sample.fresh(requires_grad=True)

        def loss(*inputs, tensors=tensors, reduction=reduction, soft=soft):
            given = iter(inputs)
            arguments = [next(given) if t is not None and t.requires_grad else t for t in tensors]
            return batch_hard_triplet_loss(
                *arguments,
                positive=positive,
                negative=negative,
                margin=2.0,
                soft=soft,
                distance=distance,
                reduction=reduction,
            )

        assert torch.autograd.gradcheck(loss, leaves(tensors))
        # In a random direction: what torch's own operations make of the gradient's formula.
        assert torch.autograd.gradgradcheck(loss, leaves(tensors), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@by_strategies
def test_opcheck(positive, negative, dtype):
    forms = [sample for sample in samples(dtype, small=True) if sample.name in FORMS]
    for sample, distance, reduction in zip(forms, DISTANCES, ("none", "sum", "mean_nonzero"), strict=True):
        tensors = sample.fresh(requires_grad=True)
        detached = (t if t is None else t.detach() for t in tensors)
        opcheck(ops.mine_triplets.default, (*detached, positive, negative, distance))
        options = (positive, negative, 0.2, reduction == "sum", distance, reduction)
        opcheck(ops.mined_triplet_loss.default, (*tensors, *options))


# ---- contracts ---------------------------------------------------------------------------------------------


@by_dtype
@by_strategies
def test_ties_go_to_the_lowest_original_index(positive, negative, dtype):
    """Copies of six points, scattered over panels and squares; those of a point carry one label, then all."""
    g = torch.Generator().manual_seed(3)
    points = torch.randn(6, 20, generator=g).to(dtype)
    which = torch.randint(6, (500,), generator=g)
    for labels in (which // 2, torch.arange(500) % 3):
        for distance in DISTANCES:
            options = {"positive": positive, "negative": negative, "distance": distance}
            got = batch_hard_mine(points[which], labels, **options)
            for a, b in zip(got, reference.batch_hard_mine(points[which], labels, **options), strict=True):
                assert torch.equal(a, b)


@by_strategies
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
def test_rows_of_whole_numbers_tie_exactly(positive, negative, distance, dtype):
    """Many negatives are exactly as far as the positive: not one of them is farther."""
    g = torch.Generator().manual_seed(10)
    options = {"positive": positive, "negative": negative, "distance": distance}
    for x in (
        torch.randint(2, (170, 32), generator=g) * 2 - 1,
        torch.randint(-3, 4, (170, 2), generator=g) + 50,
    ):
        labels = torch.randint(9, (170,), generator=g)
        got = batch_hard_mine(x.to(dtype), labels, **options)
        for a, b in zip(got, reference.batch_hard_mine(x.double(), labels, **options), strict=True):
            assert torch.equal(a, b)


def test_all_embeddings_equal():
    """Nobody is farther than anybody."""
    x = torch.ones(100, 8, requires_grad=True)
    labels = balanced_labels(100, 4, torch.Generator().manual_seed(0))
    same = (labels[:, None] == labels) & ~torch.eye(100, dtype=torch.bool)
    for positive, negative in STRATEGIES:
        options = {"positive": positive, "negative": negative}
        anchors, positives, negatives = batch_hard_mine(x, labels, **options)
        loss = batch_hard_triplet_loss(x, labels, margin=0.5, **options)
        if "semihard" in (positive, negative):
            assert len(anchors) == loss.item() == 0
        else:
            assert torch.equal(positives, same.int().argmax(1))
            assert torch.equal(negatives, (labels[:, None] != labels).int().argmax(1))
            assert loss.item() == 0.5
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("d", [16, 128])
@by_strategies
def test_selection_within_the_contracted_gap(positive, negative, d):
    """By the same gap as of batch-hard, 1e-5 of the largest centred squared norm, in squared distances."""
    g = torch.Generator().manual_seed(d)
    labels = balanced_labels(1200, 4, g)
    x = clusters(labels, d, g) * (1 + torch.rand(1200, 1, generator=g) / 2) + 5
    exact = x.double()
    squared = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").square()
    gap = 1e-5 * (exact - exact.mean(0)).square().sum(1).max()
    same = labels[:, None] == labels
    own = torch.eye(1200, dtype=torch.bool)
    anchors, positives, negatives = batch_hard_mine(x, labels, positive=positive, negative=negative)
    d_p, d_n = squared[anchors, positives][:, None], squared[anchors, negatives][:, None]
    among_positives, among_negatives = (same & ~own)[anchors], ~same[anchors]
    # What rounding cannot keep from being farther (nearer) than the other choice, and what it can make so.
    surely, perhaps = [among_positives, among_negatives], [among_positives, among_negatives]
    if positive == "semihard":
        surely[0], perhaps[0] = (among_positives & (squared[anchors] < d_n + e) for e in (-gap, gap))
    if negative == "semihard":
        surely[1], perhaps[1] = (among_negatives & (squared[anchors] > d_p - e) for e in (-gap, gap))
    for side, (chosen, strategy) in enumerate(((d_p, positive), (d_n, negative))):
        largest = (strategy == "easy") == (side == 1)
        sign = 1 if largest else -1
        best = torch.where(surely[side], sign * squared[anchors], -torch.inf).amax(1, keepdim=True)
        assert (sign * chosen >= best - gap).all()
        assert perhaps[side].gather(1, (positives, negatives)[side][:, None]).all()
    if "semihard" not in (positive, negative):
        assert torch.equal(anchors, torch.arange(1200))
    else:
        expected = reference.batch_hard_mine(exact, labels, positive=positive, negative=negative)
        assert len(anchors) > 100 and abs(len(anchors) - len(expected[0])) <= 2


def test_choice_is_right_where_the_gram_form_cancels():
    """Unit-scale points 100 away from the origin, and pairs of rows 1e-3 apart."""
    g = torch.Generator().manual_seed(5)
    points = torch.randn(300, 16, generator=g) + 100
    x = torch.cat([points, points + 1e-3 * torch.randn(300, 16, generator=g)])
    labels = torch.arange(300).repeat(2) // 2  # a row's close copy is of its label
    for positive, negative in STRATEGIES:
        options = {"positive": positive, "negative": negative}
        got = batch_hard_mine(x, labels, **options)
        for a, b in zip(got, reference.batch_hard_mine(x.double(), labels, **options), strict=True):
            assert torch.equal(a, b)


@by_strategies
@by_distance
def test_no_valid_anchor_gives_a_zero_that_is_connected_to_the_input(positive, negative, distance):
    for labels in (torch.zeros(7, dtype=torch.int64), torch.arange(7), torch.zeros(0, dtype=torch.int64)):
        for reduction in ("mean", "mean_nonzero", "sum"):
            x = torch.randn(len(labels), 3, requires_grad=True)
            loss = batch_hard_triplet_loss(
                x, labels, positive=positive, negative=negative, distance=distance, reduction=reduction
            )
            loss.backward()
            assert loss.item() == 0
            assert torch.equal(x.grad, torch.zeros_like(x))


def test_an_anchor_that_no_row_is_semi_hard_for_is_not_valid():
    """On a line: the anchor at 0 has its positive at 5, beyond all negatives."""
    x = torch.tensor([[0.0], [5.0], [1.0], [2.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    options = {"negative": "semihard", "margin": 10.0}
    anchors, positives, negatives = batch_hard_mine(x, labels, negative="semihard")
    assert [t.tolist() for t in (anchors, positives, negatives)] == [[2, 3], [3, 2], [1, 0]]
    # Row 2 is 1 from its positive and 1 from row 0, which is not farther.
    each = batch_hard_triplet_loss(x, labels, reduction="none", **options)
    assert each.tolist() == [0.0, 0.0, 1 - 4 + 10.0, 1 - 2 + 10.0]
    result = batch_hard_triplet_loss(x, labels, return_stats=True, **options)
    assert result.loss.item() == 8.0
    assert result.valid_anchors.item() == result.triplets.item() == result.active_triplets.item() == 2
    assert result.mean_d_ap.item() == 1.0
    assert result.mean_d_an.item() == 3.0


@by_dtype
@by_strategies
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_or_inf_makes_the_loss_nan(positive, negative, bad, dtype):
    for distance, where in itertools.product(DISTANCES, ("embeddings", "references")):
        x, ref = torch.randn(40, 6).to(dtype), torch.randn(50, 6).to(dtype)
        (x if where == "embeddings" else ref)[17, 3] = bad
        sets = (x.requires_grad_(), torch.arange(40) // 4)
        if where == "references":
            sets += (ref.requires_grad_(), torch.arange(50) // 4)
        options = {"positive": positive, "negative": negative, "distance": distance}
        result = batch_hard_triplet_loss(*sets, return_stats=True, **options)
        assert result.loss.isnan() and result.mean_d_ap.isnan() and result.mean_d_an.isnan()
        result.loss.backward()
        assert x.grad.isnan().all()
        assert batch_hard_triplet_loss(*sets, reduction="none", **options).isnan().all()
        assert [len(t) for t in batch_hard_mine(*sets, **options)] == [0, 0, 0]


@by_strategies
@pytest.mark.parametrize("scale", [3e18, 1.2e19, 1e30])
def test_rows_too_long_to_be_squared_are_never_a_silent_number(positive, negative, scale):
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)) * scale
    labels = torch.arange(12) // 3
    options = {"positive": positive, "negative": negative}
    loss = batch_hard_triplet_loss(x, labels, **options).double()
    exact = reference.batch_hard_triplet_loss(x.double(), labels, **options)
    assert loss.isnan() or torch.allclose(loss, exact)
    assert batch_hard_triplet_loss(x / scale * 1e17, labels, **options).isfinite()


@by_strategies
def test_the_same_bits_for_any_number_of_threads(positive, negative):
    g = torch.Generator().manual_seed(4)
    threads = torch.get_num_threads()
    for labels, copies in ((balanced_labels(900, 6, g), 1), (torch.randint(9, (40,), generator=g), 15)):
        x, labels = clusters(labels, 40, g).repeat(copies, 1), labels.repeat(copies)
        options = {"positive": positive, "negative": negative}
        found = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                leaf = x.clone().requires_grad_()
                loss = batch_hard_triplet_loss(leaf, labels, margin=100.0, **options)
                loss.backward()
                found.append((*batch_hard_mine(x, labels, **options), loss.detach(), leaf.grad))
        finally:
            torch.set_num_threads(threads)
        assert found[0][-1].any()
        assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(each, found[0], strict=True))


def test_semi_hard_rows_keep_their_side():
    """In float64, where rounding is far below what tells random distances apart."""
    x, labels = torch.randn(200, 6, dtype=torch.float64), torch.arange(200) // 8
    for positive, negative in STRATEGIES:
        a, p, n = batch_hard_mine(x, labels, positive=positive, negative=negative)
        if "semihard" in (positive, negative):
            assert len(a) > 0
            assert ((x[a] - x[p]).norm(dim=1) < (x[a] - x[n]).norm(dim=1)).all()


# ---- ways to call ------------------------------------------------------------------------------------------


@by_strategies
def test_compiles_in_one_graph_with_dynamic_shapes(positive, negative):
    torch.compiler.reset()
    options = {"positive": positive, "negative": negative}

    def both(x, labels):
        mined = batch_hard_mine(x, labels, **options)
        return batch_hard_triplet_loss(x, labels, return_stats=True, **options), mined

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (20, 35):
            x, labels = torch.randn(n, 6, dtype=torch.float64), torch.arange(n) // 5
            leaf, again = x.clone().requires_grad_(), x.clone().requires_grad_()
            (got, got_mined), (expected, mined) = compiled(leaf, labels), both(again, labels)
            for a, b in zip((*got, *got_mined), (*expected, *mined), strict=True):
                assert torch.equal(a, b)
            got.loss.backward()
            expected.loss.backward()
            assert torch.equal(leaf.grad, again.grad)


@by_strategies
def test_vmap_and_torch_func(positive, negative):
    x, labels = torch.randn(3, 20, 6, dtype=torch.float64), torch.arange(20) // 5

    def loss(x):
        return batch_hard_triplet_loss(x, labels, positive=positive, negative=negative, margin=3.0)

    assert torch.equal(torch.vmap(loss)(x), torch.stack([loss(each) for each in x]))
    gradients = torch.vmap(torch.func.grad(loss))(x)
    for each, gradient in zip(x, gradients, strict=True):
        leaf = each.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(gradient, leaf.grad)
    mined = torch.vmap(lambda x: ops.mine_triplets(x, labels, None, None, positive, negative, "cosine"))(x)
    assert all(t.shape == (3, 20) for t in mined)


def test_references_that_are_the_batch_are_the_self_form():
    x, labels = torch.randn(60, 5), torch.arange(60) // 5
    for positive, negative in STRATEGIES:
        options = {"positive": positive, "negative": negative}
        for a, b in zip(
            batch_hard_mine(x, labels, x, labels, **options),
            batch_hard_mine(x, labels, **options),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["mine_triplets", "mined_triplet_loss"])
def test_the_ops_guard_memory_and_check_their_names(op):
    x, labels = torch.randn(6, 3), torch.arange(6) // 2
    options = ("euclidean",) if op == "mine_triplets" else (0.2, False, "euclidean", "mean")
    call = getattr(ops, op)
    with pytest.raises(ValueError, match=rf"{op}: labels must be of shape \[6\]"):
        call(x, labels[:5], None, None, "hard", "easy", *options)
    with pytest.raises(TypeError, match=f"{op}: embeddings must be float32"):
        call(x.long(), labels, None, None, "hard", "easy", *options)
    with pytest.raises(
        ValueError, match=f"{op}: positive must be one of 'hard', 'easy', 'semihard', got 'x'"
    ):
        call(x, labels, None, None, "x", "easy", *options)
    with pytest.raises(ValueError, match=f"{op}: negative must be one of 'hard', 'easy', 'semihard', got ''"):
        call(x, labels, None, None, "easy", "", *options)
    with pytest.raises(ValueError, match=f"{op}: negative must be 'hard' or 'easy' with positive='semihard'"):
        call(x, labels, None, None, "semihard", "semihard", *options)
    with pytest.raises(ValueError, match=f"{op}: distance must be one of"):
        call(x, labels, None, None, "hard", "easy", *("l2" if o == "euclidean" else o for o in options))
