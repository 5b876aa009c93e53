"""deepsim_ext.compat.pytorch_metric_learning against the installed pytorch-metric-learning.

Theirs is asked in float64, ours in float64 and float32 on the same values: theirs in float32 has errors of
its own (see the tests of what is wrong there).
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from deepsim_ext.compat import _mining, _pairs
from deepsim_ext.compat import pytorch_metric_learning as ours

from .samples import Sample, balanced_labels

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))

DISTANCES = {
    "default": lambda: None,
    "unnormalized": lambda: distances.LpDistance(normalize_embeddings=False),
    "squared": lambda: distances.LpDistance(power=2),
    "unnormalized_squared": lambda: distances.LpDistance(normalize_embeddings=False, power=2),
    "cosine": distances.CosineSimilarity,
}
by_distance = pytest.mark.parametrize("distance", DISTANCES)
REDUCERS = {
    "default": lambda: None,
    "nonzero": reducers.AvgNonZeroReducer,
    "above_zero": lambda: reducers.ThresholdReducer(low=0),
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
}


def batches(dtype: torch.dtype = torch.float64) -> Iterator[Sample]:
    """(embeddings, labels, ref_embeddings, ref_labels), most in float32's values."""
    g = torch.Generator().manual_seed(33)

    def points(n: int, d: int, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(n, d, generator=g) + shift).to(dtype)

    def labels(n: int, classes: int) -> torch.Tensor:
        return torch.randint(classes, (n,), generator=g)

    yield Sample("random", [points(12, 3), labels(12, 3), None, None])
    yield Sample("more_rows", [points(41, 8), labels(41, 6), None, None])
    yield Sample("balanced", [points(64, 16), balanced_labels(64, 4, g), None, None])
    yield Sample("with_singletons", [points(20, 4), labels(20, 14), None, None])
    yield Sample("one_class", [points(9, 4), torch.full((9,), 7), None, None])
    yield Sample("all_singletons", [points(9, 4), torch.arange(9), None, None])
    yield Sample("two_of_a_kind", [points(2, 4), torch.zeros(2, dtype=torch.int64), None, None])
    yield Sample("two_kinds", [points(2, 4), torch.arange(2), None, None])
    yield Sample("one_row", [points(1, 4), torch.arange(1), None, None])
    yield Sample("duplicates", [points(6, 5).repeat(4, 1), labels(6, 3).repeat(4), None, None])
    yield Sample("zero_rows", [points(9, 4) * (torch.arange(9) % 3 > 0)[:, None], labels(9, 3), None, None])
    yield Sample("offset", [points(24, 8, 100.0), labels(24, 5), None, None])
    yield Sample("strange_labels", [points(12, 4), labels(12, 3) * 2**40 - 2**41, None, None])
    yield Sample("int32_labels", [points(12, 4), labels(12, 3).int(), None, None])
    yield Sample("references", [points(8, 4), labels(8, 3), points(13, 4), labels(13, 3)])
    yield Sample("more_references", [points(30, 4), labels(30, 9), points(70, 4), labels(70, 12)])
    yield Sample("fewer_references", [points(13, 4), labels(13, 3), points(8, 4), labels(8, 4)])
    yield Sample("strangers", [points(5, 4), labels(5, 2), points(7, 4), labels(7, 2) + 2])
    same = points(15, 4), labels(15, 4)
    yield Sample("same_rows_other_labels", [*same, same[0], labels(15, 4)])
    # Two views of one batch: as theirs, row i of one is not a positive of row i of the other.
    yield Sample("same_labels_tensor", [*same, points(15, 4), same[1]])
    yield Sample("itself_by_name", [*same, *same])


def fresh(sample: Sample, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """New leaves in which what was one tensor still is."""
    made: dict[int, torch.Tensor | None] = {id(None): None}
    for t in sample.tensors:
        if id(t) not in made:
            made[id(t)] = t.to(dtype, copy=True).requires_grad_() if t.is_floating_point() else t.clone()
    return [made[id(t)] for t in sample.tensors]


def compare(mine, upstream, sample, dtype, mined=(None, None)):
    """Loss and gradients of both on one batch; `mined` are index tuples, ours and theirs."""
    rtol = TOLERANCE[dtype]
    results = []
    for loss, kind, indices in ((mine, dtype, mined[0]), (upstream, torch.float64, mined[1])):
        x, labels, ref, ref_labels = fresh(sample, kind)
        value = loss(x, labels, indices, ref, ref_labels)
        value.backward()
        leaves = {id(t): t for t in (x, ref) if t is not None}.values()
        # Where there is nothing to compare theirs knows nothing of the references.
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
        results.append((value.detach(), torch.cat([g.flatten() for g in gradients])))
    (got, got_gradient), (expected, expected_gradient) = results
    assert got.dtype == dtype
    name = sample.name
    torch.testing.assert_close(
        got.double(), expected, rtol=rtol, atol=rtol / 20, msg=lambda text: f"{name}: {text}"
    )
    difference = (got_gradient.double() - expected_gradient).norm()
    assert difference <= rtol * expected_gradient.norm() + 1e-12, (name, difference)


def same_indices(got, expected):
    assert len(got) == len(expected)
    assert all(t.dtype == torch.int64 for t in got)
    pairs = ((got[:2], expected[:2]), (got[2:], expected[2:])) if len(got) == 4 else ((got, expected),)
    for one, other in pairs:
        assert sorted(zip(*(t.tolist() for t in one), strict=True)) == sorted(
            zip(*(t.tolist() for t in other), strict=True)
        )


# ---- miners ------------------------------------------------------------------------------------------------


@by_dtype
@by_distance
def test_batch_hard_miner(distance, dtype):
    for sample in batches():
        got = ours.BatchHardMiner(distance=DISTANCES[distance]())
        expected = miners.BatchHardMiner(distance=DISTANCES[distance]())
        indices = got(*fresh(sample, dtype))
        if sample.name == "offset" and dtype is torch.float32:
            continue  # normalised or as cosines, distances differ by less than float32's rounding
        if sample.name == "zero_rows" and distance in ("default", "squared"):
            continue  # a zero vector is at distance 1 from all unit vectors, but for rounding
        same_indices(indices, expected(*fresh(sample, torch.float64)))
        assert indices[0].tolist() == sorted(indices[0].tolist())
        assert got.num_triplets == len(indices[0])


STRATEGIES = [
    (p, n)
    for p, n in itertools.product(("easy", "semihard", "hard", "all"), repeat=2)
    if {p, n} not in ({"semihard"}, {"semihard", "all"})
]


RANGES = ((None, None), ((0.1, 0.9), None), (None, (0.3, 1.2)), ((0.2, 5), (-1, 0.9)))


@pytest.mark.parametrize("distance", ["default", "unnormalized_squared", "cosine"])
@pytest.mark.parametrize("strategies", STRATEGIES, ids="-".join)
def test_batch_easy_hard_miner(strategies, distance):
    for sample, ranges in itertools.product(batches(), RANGES):
        if sample.name in ("duplicates", "zero_rows"):
            continue  # ties, of which theirs takes the first only as long as rounding keeps them ties
        got = ours.BatchEasyHardMiner(*strategies, *ranges, distance=DISTANCES[distance]())
        expected = miners.BatchEasyHardMiner(*strategies, *ranges, distance=DISTANCES[distance]())
        same_indices(got(*fresh(sample, torch.float64)), expected(*fresh(sample, torch.float64)))
        assert (got.num_pos_pairs, got.num_neg_pairs) == (expected.num_pos_pairs, expected.num_neg_pairs)


@pytest.mark.parametrize("strategies", [s for s in STRATEGIES if "all" not in s], ids="-".join)
def test_one_of_each_is_mined_by_the_op(strategies, monkeypatch):
    """In chunks there is the same, for who asks for ranges."""
    miner = ours.BatchEasyHardMiner(*strategies)
    anything = ours.BatchEasyHardMiner(*strategies, (-1, 100), (-1, 100))
    for sample in batches():
        if sample.name != "same_labels_tensor":  # there a row of the references is left out for each anchor
            expected = anything(*sample.tensors)
            with monkeypatch.context() as m:
                m.delattr(_mining, "pick")
                same_indices(miner(*sample.tensors), expected)


def test_defaults_of_the_miners():
    sample = next(batches())
    for name in ("BatchHardMiner", "BatchEasyHardMiner", "TripletMarginMiner"):
        got, expected = getattr(ours, name)(), getattr(miners, name)()
        same_indices(got(*sample.tensors), expected(*sample.tensors))
    ranges = {"allowed_pos_range": (0.5, 1.5), "allowed_neg_range": (0.5, 1.0)}
    got, expected = ours.BatchHardMiner(**ranges), miners.BatchHardMiner(**ranges)
    same_indices(got(*sample.tensors), expected(*sample.tensors))


@by_distance
@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
def test_triplet_margin_miner(kind, distance):
    for sample in batches():
        if sample.name in ("duplicates", "zero_rows"):
            continue  # a difference of 0 is on either side of 0, as rounding has it
        got = ours.TripletMarginMiner(0.3, kind, distance=DISTANCES[distance]())
        expected = miners.TripletMarginMiner(0.3, kind, distance=DISTANCES[distance]())
        indices = got(*fresh(sample, torch.float64))
        same_indices(indices, expected(*fresh(sample, torch.float64)))
        assert got.num_triplets == len(indices[0])


@pytest.mark.parametrize("n", [40, 400])  # the latter by products
def test_a_row_that_is_not_finite_takes_no_others_triplets(n):
    x, labels = torch.randn(n, 64), torch.arange(n) // 4
    miner = ours.TripletMarginMiner(0.2)
    whole = miner(x, labels)
    x[0, 0] = float("nan")
    kept = [(t != 0) for t in whole]
    expected = [t[kept[0] & kept[1] & kept[2]] for t in whole]
    same_indices(miner(x, labels), tuple(expected))


def test_miners_take_nothing_of_nothing():
    x, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    for miner in (ours.BatchHardMiner(), ours.BatchEasyHardMiner(), ours.TripletMarginMiner()):
        assert all(len(t) == 0 for t in miner(x, labels))
        assert all(len(t) == 0 for t in miner(torch.randn(3, 4), torch.arange(3), x, labels))


# ---- losses over all pairs and triplets --------------------------------------------------------------------


def comparable_batches(distance: str) -> Iterator[Sample]:
    """Zero vectors under cosine have a test of their own: there the gradients differ."""
    return (b for b in batches() if not (distance == "cosine" and b.name == "zero_rows"))


@by_dtype
@by_distance
def test_triplet_margin_loss_over_all_triplets(distance, dtype):
    settings = zip(REDUCERS.values(), (0.05, 0.05, 0.2, 0.4, 0.9), strict=True)
    for sample, (reducer, margin) in itertools.product(comparable_batches(distance), settings):
        options = {"margin": margin, "reducer": reducer(), "distance": DISTANCES[distance]()}
        compare(ours.TripletMarginLoss(**options), losses.TripletMarginLoss(**options), sample, dtype)


@by_dtype
@pytest.mark.parametrize("distance", ["default", "unnormalized_squared", "cosine"])
@pytest.mark.parametrize("swap,smooth", [(True, False), (False, True), (True, True)])
def test_triplet_margin_loss_without_a_fused_form(swap, smooth, distance, dtype):
    every_reducer = itertools.cycle(REDUCERS.values())
    for sample in comparable_batches(distance):
        if swap and sample.tensors[2] is not None and sample.name != "itself_by_name":
            continue  # theirs is wrong there, see below
        if swap and sample.name == "zero_rows":
            continue  # d_an and d_pn are both 1, and which of them has the gradient is up to rounding
        options = {"swap": swap, "smooth_loss": smooth, "margin": 0.3, "reducer": next(every_reducer)()}
        options["distance"] = DISTANCES[distance]()
        compare(ours.TripletMarginLoss(**options), losses.TripletMarginLoss(**options), sample, dtype)


@by_dtype
@by_distance
def test_contrastive_loss_over_all_pairs(distance, dtype):
    settings = itertools.product(({}, {"pos_margin": 0.3, "neg_margin": 0.8}), REDUCERS.values())
    for sample, (margins, reducer) in itertools.product(comparable_batches(distance), settings):
        if distance == "cosine" and margins:
            margins = {"pos_margin": 0.9, "neg_margin": 0.2}
        if sample.name == "zero_rows" and not margins:
            margins = {"neg_margin": 1.2}  # 1 is what a zero vector and a unit vector are apart
        options = {**margins, "reducer": reducer(), "distance": DISTANCES[distance]()}
        compare(ours.ContrastiveLoss(**options), losses.ContrastiveLoss(**options), sample, dtype)


def test_normalized_dot_products_are_cosines():
    for sample in itertools.islice(batches(), 4):
        compare(
            ours.ContrastiveLoss(1, 0, distance=distances.DotProductSimilarity()),
            losses.ContrastiveLoss(1, 0, distance=distances.DotProductSimilarity()),
            sample,
            torch.float64,
        )


def test_cosine_of_zero_vectors():
    """The loss is theirs; a zero vector has no gradient, where theirs divides by 1e-12 and blows up."""
    (sample,) = (b for b in batches() if b.name == "zero_rows")
    x, labels, _, _ = fresh(sample, torch.float64)
    zero = (x == 0).all(dim=1)
    for name, margins in (("TripletMarginLoss", (0.9,)), ("ContrastiveLoss", (0.9, -0.5))):
        got, expected = (
            getattr(m, name)(*margins, distance=distances.CosineSimilarity())(x, labels)
            for m in (ours, losses)
        )
        torch.testing.assert_close(got, expected)
        got, expected = (torch.autograd.grad(value, x)[0] for value in (got, expected))
        torch.testing.assert_close(got[~zero], expected[~zero])
        assert not got[zero].any()
        assert expected[zero].abs().max() > 1e8


@pytest.mark.parametrize("swap,smooth", [(False, False), (True, False), (True, True)])
def test_chunks_of_anchors_make_no_difference(swap, smooth, monkeypatch):
    """As many chunks as anchors, and list entries: results of one chunk."""
    sample = next(b for b in batches() if b.name == "more_rows")
    view = next(b for b in batches() if b.name == "same_labels_tensor")
    whole = _pairs.CHUNK
    results = []
    for chunk in (whole, 20):
        monkeypatch.setattr(_pairs, "CHUNK", chunk)
        for batch in (sample, view):
            x, labels, ref, ref_labels = fresh(batch, torch.float64)
            loss = ours.TripletMarginLoss(swap=swap, smooth_loss=smooth)(x, labels, None, ref, ref_labels)
            a, p, b, n = ours.BatchEasyHardMiner("hard", "all")(x, labels, ref, ref_labels)
            few = (a, p, b[::9], n[::9])
            loss = loss + ours.ContrastiveLoss(0.1)(x, labels, few, ref, ref_labels)
            if ref is not None:
                loss = loss + ours.ContrastiveLoss(0.1)(x, labels, None, ref, ref_labels)
            mined = ours.TripletMarginMiner()(x, labels, ref, ref_labels)
            results.append((loss.detach(), *torch.autograd.grad(loss, x), a, p, b, n, *mined))
    half = len(results) // 2
    for one, many in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(one, many)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("distance", ["default", "unnormalized", "cosine"])
def test_half_precision_is_computed_in_float32(distance, dtype):
    sample = next(b for b in batches() if b.name == "references")
    x, labels, ref, ref_labels = fresh(sample, dtype)
    exact = x.detach().double().requires_grad_()
    mined = miners.BatchHardMiner()(exact, labels, ref.double(), ref_labels)
    for name, options in (
        ("TripletMarginLoss", {}),
        ("TripletMarginLoss", {"smooth_loss": True}),
        ("ContrastiveLoss", {}),
    ):
        for indices in (None, mined):
            got = getattr(ours, name)(distance=DISTANCES[distance](), **options)
            loss = got(x, labels, indices, ref, ref_labels)
            upstream = getattr(losses, name)(distance=DISTANCES[distance](), **options)
            expected = upstream(exact, labels, indices, ref.double(), ref_labels)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
            (gradient,) = torch.autograd.grad(loss, x)
            (expected,) = torch.autograd.grad(expected, exact)
            assert gradient.dtype == dtype
            assert (gradient.double() - expected).norm() <= 1e-2 * expected.norm()


# ---- losses of listed pairs and triplets -------------------------------------------------------------------

MINERS = {
    "hard": lambda m: m.BatchHardMiner(),
    "pairs": lambda m: m.BatchEasyHardMiner("all", "hard"),
    "one_each": lambda m: m.BatchEasyHardMiner("easy", "semihard"),
    "violating": lambda m: m.TripletMarginMiner(0.1),
}
LOSSES = {
    "triplet": lambda m, r: m.TripletMarginLoss(0.1, reducer=r),
    "triplet_smooth": lambda m, r: m.TripletMarginLoss(
        0.1, smooth_loss=True, reducer=r, distance=distances.LpDistance(normalize_embeddings=False)
    ),
    "triplet_cosine": lambda m, r: m.TripletMarginLoss(0.1, reducer=r, distance=distances.CosineSimilarity()),
    "contrastive": lambda m, r: m.ContrastiveLoss(0.2, 0.9, reducer=r),
    "contrastive_squared": lambda m, r: m.ContrastiveLoss(
        0.2, 0.9, reducer=r, distance=distances.LpDistance(power=2)
    ),
    "contrastive_cosine": lambda m, r: m.ContrastiveLoss(
        0.9, 0.3, reducer=r, distance=distances.CosineSimilarity()
    ),
}


@by_dtype
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("miner", MINERS)
def test_losses_with_miners(miner, loss, dtype):
    """Each side's loss with its own miner, and with the other's."""
    every_reducer = itertools.cycle(REDUCERS.values())
    for i, sample in enumerate(batches()):
        if sample.name in ("duplicates", "zero_rows", "one_row", "two_of_a_kind", "two_kinds"):
            continue  # ties in the mining; a list of one pair, see below
        mined = [MINERS[miner](m)(*fresh(sample, torch.float64)) for m in (ours, miners)]
        reducer = next(every_reducer)
        compare(
            LOSSES[loss](ours, reducer()),
            LOSSES[loss](losses, reducer()),
            sample,
            dtype,
            mined=mined[:: 1 if i % 3 else -1],
        )


def test_listed_without_labels():
    x, ref = torch.randn(6, 3), torch.randn(9, 3)
    triplets = torch.tensor([0, 3, 3]), torch.tensor([8, 1, 2]), torch.tensor([4, 0, 0])
    for name in ("TripletMarginLoss", "ContrastiveLoss"):
        got = getattr(ours, name)()(x, indices_tuple=triplets, ref_emb=ref)
        expected = getattr(losses, name)()(x, indices_tuple=triplets, ref_emb=ref)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("count", [3, 900])
def test_indices_from_the_end(count):
    """Of short lists and of long ones, which are measured in different ways."""
    x = torch.randn(30, 3)
    triplets = [t - 30 for t in torch.randint(30, (3, count))]
    got, expected = (m.TripletMarginLoss()(x, indices_tuple=triplets) for m in (ours, losses))
    torch.testing.assert_close(got, expected)
    triplets[1][0] = -31
    with pytest.raises(IndexError):
        ours.TripletMarginLoss()(x, indices_tuple=triplets)


@pytest.mark.parametrize("count", [3, 900])
def test_autocast_takes_references_of_another_precision(count):
    """What they have in float32 counts, whatever the embeddings have."""
    x, ref = torch.randn(30, 16).bfloat16(), torch.randn(30, 16)
    triplets, options = torch.randint(30, (3, count)).unbind(), {"distance": DISTANCES["unnormalized"]()}
    with torch.autocast("cpu"):
        got = ours.TripletMarginLoss(**options)(x, indices_tuple=triplets, ref_emb=ref)
    expected = losses.TripletMarginLoss(**options)(x.double(), indices_tuple=triplets, ref_emb=ref.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_forward_mode_of_a_list():
    x = torch.randn(12, 3, dtype=torch.float64)
    triplets = torch.arange(12).view(3, 4)

    def value(x):
        return ours.TripletMarginLoss(2.0)(x, indices_tuple=triplets)

    tangent = torch.func.jvp(value, (x,), (torch.ones_like(x) * x[:, :1],))[1]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    torch.testing.assert_close(tangent, (gradient * x[:, :1]).sum())


def test_swap_in_a_list():
    x, labels = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) // 4
    triplets = miners.TripletMarginMiner(1.0)(x, labels)
    got, expected = (m.TripletMarginLoss(0.3, swap=True)(x, labels, triplets) for m in (ours, losses))
    torch.testing.assert_close(got, expected)


def test_pairs_joined_to_triplets():
    g = torch.Generator().manual_seed(2)
    for sizes in ((30, 50), (0, 4), (4, 0), (1, 1)):
        a, p = torch.randint(9, (2, sizes[0]), generator=g)
        b, n = torch.randint(9, (2, sizes[1]), generator=g)
        same_indices(_pairs.as_triplets((a, p, b, n)), lmu.convert_to_triplets((a, p, b, n), None))


def test_drawn_triplets():
    """Random, so not theirs one by one: as many, valid, each as likely as the other."""
    for sample in batches():
        x, labels, ref, ref_labels = fresh(sample, torch.float64)
        torch.manual_seed(0)
        loss = ours.TripletMarginLoss(triplets_per_anchor=500)
        got = _pairs.sampled_triplets(loss._batch(x, labels, ref, ref_labels), 500)
        everything = lmu.get_all_triplets_indices(labels, labels if ref is None else ref_labels)
        count = torch.stack(got, dim=1).unique(dim=0, return_counts=True)[1]
        if len(everything[0]) < 300:  # then all of them were drawn, about equally often for an anchor
            same_indices(tuple(torch.stack(got, dim=1).unique(dim=0).unbind(1)), everything)
            per_anchor = 500 / torch.bincount(everything[0], minlength=1)
            expected = per_anchor[torch.stack(got, dim=1).unique(dim=0)[:, 0]]
            assert ((count - expected).abs() < 6 * expected.sqrt()).all()
        assert torch.equal(
            got[0].unique(return_counts=True)[1], torch.full((len(everything[0].unique()),), 500)
        )
        assert loss(x, labels, None, ref, ref_labels).isfinite()


# ---- cross-batch memory ------------------------------------------------------------------------------------


def stream(n, d, classes, seed=0):
    g = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g)


def assert_same_queue(got, expected):
    assert got.queue_idx == expected.queue_idx
    assert got.has_been_filled == expected.has_been_filled
    assert torch.equal(got.embedding_memory, expected.embedding_memory)
    assert torch.equal(got.label_memory, expected.label_memory)
    assert got.state_dict().keys() == expected.state_dict().keys()


def step_both(got, expected, x, labels, *args, **options):
    results = []
    for memory in (got, expected):
        leaf = x.clone().requires_grad_()
        loss = memory(leaf, labels, *args, **options)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert_same_queue(got, expected)


MEMORY_LOSSES = {
    **{name: loss for name, loss in LOSSES.items()},
    "contrastive_default": lambda m, r: m.ContrastiveLoss(reducer=r),
}


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("loss", MEMORY_LOSSES)
@pytest.mark.parametrize("miner", [None, *MINERS])
def test_cross_batch_memory(miner, loss, reducer):
    """Batches that fill the queue in part, wrap around its end, and fill it at once."""
    for n, size in ((7, 30), (6, 18), (9, 9)):
        got, expected = (
            module.CrossBatchMemory(
                MEMORY_LOSSES[loss](module, REDUCERS[reducer]()),
                5,
                memory_size=size,
                miner=None if miner is None else MINERS[miner](mining),
            )
            for module, mining in ((ours, ours), (losses, miners))
        )
        for x, labels in itertools.islice(stream(n, 5, 4), 6):
            step_both(got, expected, x, labels)


@pytest.mark.parametrize("reducer", REDUCERS)
def test_zero_vectors_in_a_cross_batch_memory(reducer):
    """A zero vector is at cosine distance 1 from its own copy, too, and is still not compared with it."""
    got, expected = (
        m.CrossBatchMemory(LOSSES["contrastive_cosine"](m, REDUCERS[reducer]()), 5, 20)
        for m in (ours, losses)
    )
    for x, labels in itertools.islice(stream(8, 5, 3), 4):
        x[::3] = 0
        torch.testing.assert_close(got(x, labels), expected(x, labels))


@pytest.mark.parametrize("miner", [None, "hard", "pairs"])
@pytest.mark.parametrize("loss", MEMORY_LOSSES)
def test_cross_batch_memory_with_an_enqueue_mask(loss, miner):
    got, expected = (
        module.CrossBatchMemory(MEMORY_LOSSES[loss](module, None), 5, 20, miner and MINERS[miner](mining))
        for module, mining in ((ours, ours), (losses, miners))
    )
    for i, (x, labels) in enumerate(itertools.islice(stream(12, 5, 4), 6)):
        step_both(got, expected, x, labels, enqueue_mask=torch.arange(12) % 3 > i % 2)


@pytest.mark.parametrize("kind", ["triplets", "pairs"])
@pytest.mark.parametrize("loss", ["triplet", "contrastive"])
@pytest.mark.parametrize("miner", [None, "hard"])
def test_cross_batch_memory_with_more_indices(miner, loss, kind):
    got, expected = (
        module.CrossBatchMemory(LOSSES[loss](module, None), 5, 21, miner and MINERS[miner](mining))
        for module, mining in ((ours, ours), (losses, miners))
    )
    listing = MINERS["hard" if kind == "triplets" else "pairs"](miners)
    for x, labels in itertools.islice(stream(8, 5, 3), 5):
        step_both(got, expected, x, labels, listing(x, labels))


def test_cross_batch_memory_around_each_other():
    """Their memory with our loss and miner, and the reverse."""
    reference = losses.CrossBatchMemory(losses.ContrastiveLoss(), 5, 20, miners.BatchHardMiner())
    for memory in (
        losses.CrossBatchMemory(ours.ContrastiveLoss(), 5, 20, ours.BatchHardMiner()),
        ours.CrossBatchMemory(losses.ContrastiveLoss(), 5, 20, miners.BatchHardMiner()),
        ours.CrossBatchMemory(losses.ContrastiveLoss(), 5, 20, ours.BatchHardMiner()),
    ):
        reference.reset_queue()
        for x, labels in itertools.islice(stream(8, 5, 3), 4):
            step_both(memory, reference, x, labels)
    without = (
        ours.CrossBatchMemory(losses.TripletMarginLoss(), 5, 20),
        losses.CrossBatchMemory(losses.TripletMarginLoss(), 5, 20),
    )
    for x, labels in itertools.islice(stream(8, 5, 3), 4):
        step_both(*without, x, labels)


def test_state_dict_of_a_memory_goes_both_ways():
    got, expected = (m.CrossBatchMemory(m.ContrastiveLoss(), 5, 20) for m in (ours, losses))
    batch = stream(8, 5, 3)
    got(*next(batch))
    expected.to(torch.float64).load_state_dict(got.state_dict())
    assert torch.equal(expected.embedding_memory, got.embedding_memory)
    expected(*next(batch))
    got.load_state_dict(expected.state_dict())
    assert torch.equal(expected.embedding_memory, got.embedding_memory)
    got.reset_queue()
    assert (got.queue_idx, got.has_been_filled, got.embedding_memory.any().item()) == (0, False, False)


def test_add_to_memory():
    got, expected = (m.CrossBatchMemory(m.ContrastiveLoss(), 5, 20) for m in (ours, losses))
    for x, labels in itertools.islice(stream(8, 5, 3), 4):
        for memory in (got, expected):
            memory.add_to_memory(x.float(), labels, 8)
        assert_same_queue(got, expected)
        assert torch.equal(got.curr_batch_idx, expected.curr_batch_idx)


# ---- where theirs is wrong ---------------------------------------------------------------------------------


def test_wrong_upstream_hardest_negative_far_from_the_origin():
    """float32, 100 away from the origin. From 26 rows on theirs takes |a|^2 + |b|^2 - 2ab, which cancels."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(300, 4, generator=g) / 10 + 100
    labels = balanced_labels(300, 4, g)
    for distance in ("default", "unnormalized"):
        got, wrong, exact = (
            torch.stack(m.BatchHardMiner(distance=DISTANCES[distance]())(rows, labels))
            for m, rows in ((ours, x), (miners, x), (miners, x.double()))
        )
        assert torch.equal(got, exact)
        assert (wrong != exact).any(dim=0).float().mean() > 0.4


def test_wrong_upstream_copies_count_as_pairs_that_cost_something():
    """By the same cancellation equal rows differ a little, and the mean over non-zero losses counts them."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).repeat(6, 1) * 3
    labels = torch.arange(48) % 4
    options = {"reducer": reducers.AvgNonZeroReducer(), "distance": DISTANCES["unnormalized"]()}
    exact = losses.ContrastiveLoss(**options)
    direct = ours.ContrastiveLoss(**options)(x, labels)
    one_each = exact(x[:24].double(), labels[:24])  # three copies of each row: no more than 25 rows, so exact
    torch.testing.assert_close(direct.double(), one_each)
    assert exact(x, labels) < 0.95 * one_each


def test_wrong_upstream_nan_is_left_out_of_the_mean():
    """NaN > 0 is false, so theirs averages the rest: a silent number. Ours is NaN."""
    x, labels = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 3
    x[5, 2] = float("nan")
    mined = tuple(torch.tensor(t) for t in ([0, 3], [1, 5], [6, 9]))
    for name, options in (("TripletMarginLoss", {"margin": 2.0}), ("ContrastiveLoss", {})):
        for indices in (None, mined):
            assert getattr(losses, name)(**options)(x, labels, indices).isfinite()
            assert getattr(ours, name)(**options)(x, labels, indices).isnan()
    assert ours.TripletMarginLoss(swap=True)(x, labels).isnan()


def test_wrong_upstream_swap_with_references():
    """Theirs reads d_pn from row p of the anchors' matrix, though p is a row of the references. Where there
    are more of these than anchors it even ends in an index error (its issue 748)."""
    x, ref = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    labels, ref_labels = torch.arange(9) % 3, torch.arange(9) % 3
    a, p, n = lmu.get_all_triplets_indices(labels, ref_labels)
    unit = torch.nn.functional.normalize(x), torch.nn.functional.normalize(ref)
    d_ap, d_an, d_pn = (
        (y[i] - unit[1][j]).norm(dim=1) for y, i, j in ((unit[0], a, p), (unit[0], a, n), (unit[1], p, n))
    )
    violation = (d_ap - d_an.minimum(d_pn) + 0.3).relu()
    expected = violation[violation > 0].mean()
    got = ours.TripletMarginLoss(0.3, swap=True)
    torch.testing.assert_close(got(x, labels, None, ref, ref_labels), expected)
    torch.testing.assert_close(got(x, labels, (a, p, n), ref, ref_labels), expected)
    upstream = losses.TripletMarginLoss(0.3, swap=True)
    assert (upstream(x, labels, None, ref, ref_labels) - expected).abs() > 1e-3
    with pytest.raises(IndexError):
        upstream(x[:5], labels[:5], None, ref, ref_labels)
    assert got(x[:5], labels[:5], None, ref, ref_labels).isfinite()


def test_wrong_upstream_one_pair_of_each_kind_costs_nothing():
    """Theirs takes lists of at most one pair for empty ones."""
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.1]])
    one = torch.tensor([0]), torch.tensor([1]), torch.tensor([1]), torch.tensor([2])
    assert losses.ContrastiveLoss()(x, indices_tuple=one).item() == 0
    unit = torch.nn.functional.normalize(x)
    expected = (unit[0] - unit[1]).norm() + 1 - (unit[1] - unit[2]).norm()
    torch.testing.assert_close(ours.ContrastiveLoss()(x, indices_tuple=one), expected)


def test_wrong_upstream_one_row_at_a_time_is_compared_with_itself():
    """A batch of one row, both its first and its last, looks to theirs like one that wraps around the queue's
    end, where the row's own copy is not found: a positive at distance 0 that the row does not have."""
    rows = torch.eye(3, 4, dtype=torch.float64)
    got, expected = (m.CrossBatchMemory(m.TripletMarginLoss(2.0), 4, 8) for m in (ours, losses))
    for i, (x, wrong) in enumerate(zip(rows, (0, 2 - 2**0.5, 2 - 2**0.5), strict=True)):
        label = torch.tensor([i])
        assert got(x[None], label).item() == 0  # no two rows of one label
        assert expected(x[None], label).item() == pytest.approx(wrong)


def test_wrong_upstream_nothing_enqueued_declares_the_queue_full():
    """Theirs then compares with rows of zeros and label 0 that nobody put there."""
    (x, labels) = next(stream(8, 5, 3))
    got, expected = (m.CrossBatchMemory(m.ContrastiveLoss(), 5, 20) for m in (ours, losses))
    nothing = torch.zeros(8, dtype=torch.bool)
    assert got(x, labels, enqueue_mask=nothing).item() == 0
    assert not got.has_been_filled
    assert expected(x, labels, enqueue_mask=nothing).item() > 0
    assert expected.has_been_filled


# ---- errors ------------------------------------------------------------------------------------------------


class Taxi(distances.LpDistance):
    """A subclass may measure anything."""


@pytest.mark.parametrize(
    "distance",
    [
        distances.LpDistance(p=1),
        distances.LpDistance(power=3),
        distances.CosineSimilarity(power=2),
        distances.DotProductSimilarity(normalize_embeddings=False),
        distances.SNRDistance(),
        Taxi(),
        "euclidean",
    ],
    ids=lambda d: type(d).__name__,
)
def test_unsupported_distances(distance):
    for cls in (ours.BatchHardMiner, ours.TripletMarginMiner, ours.TripletMarginLoss, ours.ContrastiveLoss):
        with pytest.raises(ValueError, match=f"^{cls.__name__}: distance must be None, LpDistance with p=2"):
            cls(distance=distance)


def test_modules_show_their_options():
    assert repr(ours.TripletMarginLoss(0.1, swap=True)) == (
        "TripletMarginLoss(margin=0.1, swap=True, smooth_loss=False, triplets_per_anchor='all',"
        " reduction='mean_nonzero')"
    )
    assert repr(ours.ContrastiveLoss(reducer=reducers.MeanReducer())).startswith(
        "ContrastiveLoss(\n  pos_margin=0, neg_margin=1, reduction='mean'\n"
    )
    assert repr(ours.BatchHardMiner()) == (
        "BatchHardMiner(pos_strategy='hard', neg_strategy='hard', allowed_pos_range=None,"
        " allowed_neg_range=None)"
    )


def test_unsupported_arguments():
    for cls in (ours.TripletMarginLoss, ours.ContrastiveLoss):
        for reducer in (reducers.ThresholdReducer(low=0.1), reducers.DoNothingReducer()):
            with pytest.raises(
                ValueError, match=f"{cls.__name__}: reducer must be None, .*, got {type(reducer).__name__}"
            ):
                cls(reducer=reducer)
        wrong = (torch.zeros(2, dtype=torch.int64), 1, 2)
        with pytest.raises(TypeError, match="indices_tuple must be three or four tensors, got 3 of"):
            cls()(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64), wrong)
        with pytest.raises(ValueError, match="embedding_regularizer must be None, got LpRegularizer"):
            cls(embedding_regularizer=regularizers.LpRegularizer())
        with pytest.raises(ValueError, match="collect_stats must be None or False"):
            cls(collect_stats=True)
        with pytest.raises(ValueError, match="labels must be given"):
            cls()(torch.randn(3, 2))
    for cls, argument in (
        (ours.TripletMarginLoss, "margin"),
        (ours.ContrastiveLoss, "pos_margin"),
        (ours.ContrastiveLoss, "neg_margin"),
        (ours.TripletMarginMiner, "margin"),
    ):
        with pytest.raises(ValueError, match=f"{cls.__name__}: {argument} must be a finite number >= 0"):
            cls(**{argument: -0.1})
    with pytest.raises(ValueError, match="pos_margin must be at most 1 with a similarity"):
        ours.ContrastiveLoss(1.1, 0, distance=distances.CosineSimilarity())
    with pytest.raises(ValueError, match="triplets_per_anchor"):
        ours.TripletMarginLoss(triplets_per_anchor="some")
    with pytest.raises(ValueError, match="type_of_triplets"):
        ours.TripletMarginMiner(type_of_triplets="hardest")
    with pytest.raises(ValueError, match="neg_strategy"):
        ours.BatchEasyHardMiner("hard", "hardest")
    for pair in (("semihard", "semihard"), ("all", "semihard"), ("semihard", "all")):
        with pytest.raises(ValueError, match="neg_strategy"):
            ours.BatchEasyHardMiner(*pair)


def test_arguments_that_do_not_go_together():
    x, labels = torch.randn(4, 3), torch.arange(4) // 2
    for module in (ours.BatchHardMiner(), ours.ContrastiveLoss(), ours.TripletMarginLoss(swap=True)):
        with pytest.raises(ValueError, match="labels must be"):
            module(x, labels[:3])
        with pytest.raises(TypeError, match="labels must be"):
            module(x, labels.float())
        with pytest.raises(ValueError, match="ref_labels must be"):
            module(x, labels, ref_emb=torch.randn(5, 3), ref_labels=labels)
    memory = ours.CrossBatchMemory(ours.ContrastiveLoss(), 3, 3)
    with pytest.raises(ValueError, match="at most memory_size=3 rows"):
        memory(x, labels)
    mask = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="indices_tuple must be None"):
        memory(x, labels, (labels,) * 3, mask)
    with pytest.raises(ValueError, match="enqueue_mask must be bool"):
        memory(x, labels, enqueue_mask=mask[:3])


def test_nothing_is_imported_from_the_other_library():
    code = (
        "import sys, deepsim_ext.compat as c; c.pytorch_metric_learning.TripletMarginLoss();"
        "assert not {'pytorch_metric_learning', 'sentence_transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_batches_through_the_memory_before_one_backward():
    """The queue is overwritten in between; each loss keeps what it has seen."""
    g = torch.Generator().manual_seed(40)
    x, labels = torch.randn(16, 8, generator=g), torch.arange(16) // 4
    for loss in (ours.ContrastiveLoss(), ours.TripletMarginLoss()):
        memory, again = ours.CrossBatchMemory(loss, 8, 24), ours.CrossBatchMemory(loss, 8, 24)
        together, apart = x.clone().requires_grad_(), x.clone().requires_grad_()
        (memory(together, labels) + memory(together * 1.1, labels)).backward()
        again(apart, labels).backward()
        again(apart * 1.1, labels).backward()
        torch.testing.assert_close(together.grad, apart.grad)
