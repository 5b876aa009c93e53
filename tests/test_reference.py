"""The reference on its own: against numbers worked by hand, plain-Python float64 loops, and at its limits."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from deepsim_ext import reference

DISTANCES = ("euclidean", "sqeuclidean", "cosine")
REDUCTIONS = ("mean", "mean_nonzero", "sum", "none")


def line(*points: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Points on a line, [N, 1]: their distances can be read off."""
    return torch.tensor(points, dtype=dtype)[:, None]


def mined(*args, **options) -> list[list[int]]:
    return [t.tolist() for t in reference.batch_hard_mine(*args, **options)]


# ---- batch-hard, by hand -----------------------------------------------------------------------------------

LINE = line(0, 3, 1, 7)
LINE_LABELS = torch.tensor([0, 0, 1, 1])
# anchor   hardest positive   hardest negative   d_ap - d_an
#   0        1  (3)             2  (1)             2
#   1        0  (3)             2  (2)             1
#   2        3  (6)             0  (1)             5
#   3        2  (6)             1  (4)             2


def test_mine_by_hand() -> None:
    assert mined(LINE, LINE_LABELS) == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 2, 0, 1]]
    assert [t.dtype for t in reference.batch_hard_mine(LINE, LINE_LABELS)] == [torch.int64] * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"margin": 0.5}, (2.5 + 1.5 + 5.5 + 2.5) / 4),
        ({}, (2.2 + 1.2 + 5.2 + 2.2) / 4),
        ({"margin": 0.5, "reduction": "sum"}, 12.0),
        ({"margin": 0.5, "reduction": "mean_nonzero"}, 3.0),
        ({"margin": 0.5, "reduction": "none"}, [2.5, 1.5, 5.5, 2.5]),
        ({"margin": 0, "distance": "sqeuclidean", "reduction": "none"}, [8.0, 5.0, 35.0, 20.0]),
        ({"soft": True, "reduction": "none"}, [math.log1p(math.exp(z)) for z in (2, 1, 5, 2)]),
        (
            {"soft": True, "margin": 9.0, "reduction": "sum"},
            sum(math.log1p(math.exp(z)) for z in (2, 1, 5, 2)),
        ),
    ],
)
def test_loss_by_hand(options: dict, expected: float | list[float]) -> None:
    loss = reference.batch_hard_triplet_loss(LINE, LINE_LABELS, **options)
    torch.testing.assert_close(loss, torch.tensor(expected))


def test_inactive_anchors_and_stats_by_hand() -> None:
    # d_ap: 1, 1, 1.5, 1.5; d_an: 5, 4, 4, 5.5; with margin 4: 0, 1, 1.5, 0; anchor 4 has no positive.
    x, labels = line(0, 1, 5, 6.5, 100), torch.tensor([0, 0, 1, 1, 2])
    for reduction, expected in (("mean", 0.625), ("mean_nonzero", 1.25), ("sum", 2.5)):
        result = reference.batch_hard_triplet_loss(
            x, labels, margin=4, reduction=reduction, return_stats=True
        )
        assert [t.item() for t in result] == [expected, 4, 4, 2, 0.5, 1.25, 4.625]
    assert [t.dtype for t in result[1:4]] == [torch.int64] * 3
    none = reference.batch_hard_triplet_loss(x, labels, margin=4, reduction="none")
    assert none.tolist() == [0, 1, 1.5, 0, 0]


def test_only_the_loss_of_a_result_carries_a_gradient() -> None:
    result = reference.batch_hard_triplet_loss(
        LINE.clone().requires_grad_(), LINE_LABELS, return_stats=True, soft=True
    )
    assert [t.requires_grad for t in result] == [True] + [False] * 6


def test_gradient_by_hand() -> None:
    x = LINE.clone().requires_grad_()
    reference.batch_hard_triplet_loss(x, LINE_LABELS, reduction="sum").backward()
    # d/dx of |x0-x1| - |x0-x2| + |x1-x0| - |x1-x2| + |x2-x3| - |x2-x0| + |x3-x2| - |x3-x1|
    assert x.grad.flatten().tolist() == [-1 + 1 - 1 + 1, 1 + 1 - 1 + 1, -1 + 1 - 1 - 1 - 1, 1 + 1 - 1]


def test_cosine_by_hand() -> None:
    # 1 - cos: 01: 1, 02: 1-h, 03: 2, 12: 1-h, 13: 1, 23: 1+h, with h = sqrt(1/2)
    x, labels, h = torch.tensor([[1.0, 0], [0, 2], [3, 3], [-1, 0]]), torch.tensor([0, 0, 1, 1]), 0.5**0.5
    loss = reference.batch_hard_triplet_loss(x, labels, margin=0, distance="cosine", reduction="none")
    torch.testing.assert_close(loss, torch.tensor([h, h, 2 * h, h]))


def test_zero_vector_is_at_cosine_distance_one_from_all_and_gets_no_gradient() -> None:
    x = torch.tensor([[0.0, 0], [0, 0], [1, 0], [-2, 0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    result = reference.batch_hard_triplet_loss(
        x, labels, margin=3, distance="cosine", reduction="none", return_stats=True
    )
    assert result.loss.tolist() == [3, 3, 4, 4]  # d_ap: 1, 1, 2, 2; d_an: 1
    (grad,) = torch.autograd.grad(result.loss.sum(), x, create_graph=True)
    assert grad[:2].tolist() == [[0, 0], [0, 0]]
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.isfinite().all()


def test_zero_vector_can_be_the_hardest_positive() -> None:
    # From (1, 0): 1 to the zero vector, 1 - 5/13 to (5, 12), 2 to (-1, 0).
    x, labels = torch.tensor([[1.0, 0], [5, 12], [0, 0], [-1, 0]]), torch.tensor([0, 0, 0, 1])
    assert mined(x, labels, distance="cosine")[1][0] == 2


def test_float64_gaps_below_float32_rounding_decide() -> None:
    x = line(0, -3, -3 - 1e-12, 5 + 1e-12, 5, dtype=torch.float64)
    assert mined(x, torch.tensor([0, 0, 0, 1, 2])) == [[0, 1, 2], [2, 0, 0], [4, 4, 4]]


def test_reference_set_by_hand() -> None:
    x, labels = line(0, 10, 5), torch.tensor([0, 1, 7])
    refs, ref_labels = line(0, 4, -1, 8), torch.tensor([0, 0, 1, 1])
    # Anchor 0, hardest positive and negative: 4 and -1; anchor 1: -1 and 4; anchor 2: nothing has label 7.
    assert mined(x, labels, refs, ref_labels) == [[0, 1], [1, 2], [2, 1]]
    loss = reference.batch_hard_triplet_loss(x, labels, refs, ref_labels, margin=0.0, reduction="none")
    assert loss.tolist() == [4 - 1, 11 - 6, 0]
    x.requires_grad_(), refs.requires_grad_()
    reference.batch_hard_triplet_loss(x, labels, refs, ref_labels, reduction="sum").backward()
    assert x.grad.flatten().tolist() == [-1 - 1, 1 - 1, 0]
    assert refs.grad.flatten().tolist() == [0, 1 + 1, 1 - 1, 0]


def test_the_embeddings_themselves_as_references_are_the_self_form() -> None:
    x, labels = line(0, 1, 2, 9), torch.tensor([0, 1, 1, 2])
    assert mined(x, labels, x, labels) == mined(x, labels) == [[1, 2], [2, 1], [0, 0]]
    assert mined(x, labels, x.clone(), labels)[0] == [0, 1, 2, 3]  # a copy is not: each is its own positive
    same = reference.batch_hard_triplet_loss(x, labels, x, labels)
    assert torch.equal(same, reference.batch_hard_triplet_loss(x, labels))


def test_ties_go_to_the_lowest_index() -> None:
    x, labels = line(0, 1, 1, 5, 5, 5), torch.tensor([0, 0, 0, 1, 1, 1])
    assert mined(x, labels)[1:] == [[1, 0, 0, 4, 3, 3], [3, 3, 3, 1, 1, 1]]


@pytest.mark.parametrize("distance", DISTANCES)
def test_ties_go_to_the_lowest_index_in_long_rows(distance: str) -> None:
    x = torch.randn(3, 17).repeat(200, 1)  # 600 rows of 3 kinds, long enough for vectorised reductions
    labels = torch.arange(600) // 300
    _, positives, negatives = reference.batch_hard_mine(x, labels, distance=distance)
    # Equal rows are equally far, so the first of its kind wins (the second where the first is the anchor).
    assert set(positives.tolist()) <= {0, 1, 2, 3, 4, 5, 300, 301, 302, 303, 304, 305}
    assert set(positives[6:300].tolist()) <= {0, 1, 2} and set(positives[306:].tolist()) <= {300, 301, 302}
    assert negatives[:300].tolist() == [300, 301, 302] * 100
    assert negatives[300:].tolist() == [0, 1, 2] * 100


def test_labels_beyond_32_bits() -> None:
    labels = torch.tensor([5, 5, 5 + 2**32, 5 + 2**32, -(2**63), 2**63 - 1])
    assert mined(line(0, 1, 10, 11, 20, 30), labels) == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 2, 1, 4]]


# ---- batch-hard, against loops -----------------------------------------------------------------------------


def loop_distance(a: list[float], b: list[float], distance: str) -> float:
    if distance == "cosine":
        norms = math.hypot(*a) * math.hypot(*b)
        return 1 - sum(p * q for p, q in zip(a, b, strict=True)) / norms if norms else 1.0
    d = math.dist(a, b)
    return d if distance == "euclidean" else d * d


def loop_triplets(x, labels, refs, ref_labels, distance: str) -> list[tuple[int, int, int, float, float]]:
    """(anchor, positive, negative, d_ap, d_an) of every valid anchor."""
    triplets = []
    rows = x if refs is None else refs
    for i, a in enumerate(x):
        p = n = None
        for j, b in enumerate(rows):
            d = loop_distance(a, b, distance)
            if labels[i] != (labels if refs is None else ref_labels)[j]:
                n = (d, j) if n is None or d < n[0] else n
            elif refs is not None or i != j:
                p = (d, j) if p is None or d > p[0] else p
        if p and n:
            triplets.append((i, p[1], n[1], p[0], n[0]))
    return triplets


def loop_loss(triplets, n: int, margin: float, soft: bool, reduction: str) -> float | list[float]:
    losses = [0.0] * n
    for i, _, _, ap, an in triplets:
        losses[i] = math.log1p(math.exp(ap - an)) if soft else max(0.0, ap - an + margin)
    count = {"mean": len(triplets), "mean_nonzero": sum(v > 0 for v in losses), "sum": 1}.get(reduction)
    return losses if reduction == "none" else sum(losses) / max(count, 1)


@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_batch_hard_equals_loops(distance: str, with_refs: bool) -> None:
    for seed, classes in ((0, 1), (1, 3), (2, 8), (3, 20)):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(21, 5, generator=g, dtype=torch.float64) + 1.0
        labels = torch.randint(classes, (21,), generator=g)
        refs = torch.randn(13, 5, generator=g, dtype=torch.float64) if with_refs else None
        ref_labels = torch.randint(classes, (13,), generator=g) if with_refs else None
        lists = [None if t is None else t.tolist() for t in (x, labels, refs, ref_labels)]
        triplets = loop_triplets(*lists, distance)
        expected = [list(c) for c in zip(*triplets, strict=True)][:3] if triplets else [[], [], []]
        assert mined(x, labels, refs, ref_labels, distance=distance) == expected
        for reduction in REDUCTIONS:
            for options in ({"margin": 0.3}, {"soft": True}):
                loss = reference.batch_hard_triplet_loss(
                    x, labels, refs, ref_labels, distance=distance, reduction=reduction, **options
                )
                want = loop_loss(
                    triplets, 21, options.get("margin", 0), options.get("soft", False), reduction
                )
                torch.testing.assert_close(
                    loss, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize("distance", DISTANCES)
def test_selection_is_exact_for_float32_far_from_the_origin(distance: str) -> None:
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) * 1e-3 + 100
    labels = torch.arange(60) % 4
    a, p, n = mined(x, labels, distance=distance)
    for i, j, k, ap, an in loop_triplets(x.tolist(), labels.tolist(), None, None, distance):
        # Cosine distances here are near 1e-10, where the loop itself cancels: compare distances, not indices.
        if distance == "cosine":
            assert loop_distance(x[i].tolist(), x[p[i]].tolist(), distance) == pytest.approx(ap, abs=1e-15)
            assert loop_distance(x[i].tolist(), x[n[i]].tolist(), distance) == pytest.approx(an, abs=1e-15)
        else:
            assert (a[i], p[i], n[i]) == (i, j, k)
    loss = reference.batch_hard_triplet_loss(x, labels, margin=0, distance=distance, reduction="none")
    exact = reference.batch_hard_triplet_loss(
        x.double(), labels, margin=0, distance=distance, reduction="none"
    )
    tolerance = {"euclidean": 1e-8, "sqeuclidean": 1e-10, "cosine": 1e-12}[distance]
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=tolerance)


# ---- batch-hard, gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_refs", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_batch_hard_gradients(distance: str, soft: bool, with_refs: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1, 2, 0, 3])
    refs = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True) if with_refs else None
    ref_labels = torch.tensor([0, 1, 1, 2, 2]) if with_refs else None
    inputs = (x, refs) if with_refs else (x,)

    def loss(x: torch.Tensor, refs: torch.Tensor | None = None) -> torch.Tensor:
        return reference.batch_hard_triplet_loss(
            x, labels, refs, ref_labels, margin=0.5, soft=soft, distance=distance, reduction="none"
        )

    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


def test_indexed_loss_is_the_loss_of_the_mined_triplets() -> None:
    g = torch.Generator().manual_seed(4)
    x, labels = torch.randn(9, 4, generator=g), torch.tensor([0, 0, 1, 1, 2, 0, 3, 2, 9])
    positives, negatives = reference.mine_triplets(x, labels, None, None, distance="euclidean")
    assert (
        positives.tolist()[6] == positives.tolist()[8] == negatives.tolist()[6] == negatives.tolist()[8] == -1
    )
    options = {"margin": 0.2, "soft": False, "distance": "euclidean", "reduction": "mean"}
    expected, pullback = torch.func.vjp(lambda x: reference.batch_hard_triplet_loss(x, labels, **options), x)
    loss, indexed_pullback = torch.func.vjp(
        lambda x: reference.indexed_triplet_loss(x, None, positives, negatives, **options), x
    )
    assert torch.equal(loss, expected)
    assert torch.equal(indexed_pullback(torch.ones(()))[0], pullback(torch.ones(()))[0])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_at_zero_distance(distance: str, soft: bool) -> None:
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)  # everything coincides
    labels = torch.tensor([0, 0, 1, 1])
    loss = reference.batch_hard_triplet_loss(x, labels, margin=0.25, soft=soft, distance=distance)
    assert loss.item() == pytest.approx(math.log(2) if soft else 0.25, rel=1e-15)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(grad, torch.zeros_like(grad))
    (second,) = torch.autograd.grad(grad.sum() + grad.square().sum(), x)
    assert second.isfinite().all()


def test_soft_margin_does_not_overflow() -> None:
    x, labels = line(0, 1000, 0, 1000), torch.tensor([0, 0, 1, 1])
    loss = reference.batch_hard_triplet_loss(x.requires_grad_(), labels, soft=True)
    assert loss.item() == 1000
    loss.backward()
    assert x.grad.isfinite().all()
    easy = reference.batch_hard_triplet_loss(
        line(0, 0, 30, 30, dtype=torch.float64), labels, soft=True
    )  # d_ap - d_an = -30
    assert easy.item() == pytest.approx(math.exp(-30), rel=1e-12)
    hard = reference.batch_hard_triplet_loss(line(0, 30, 0, 30, dtype=torch.float64), labels, soft=True)
    assert hard.item() == math.log1p(math.exp(-30)) + 30  # softplus's default threshold would give 30


# ---- batch-hard, limits ------------------------------------------------------------------------------------

DEGENERATE = {
    "empty": torch.zeros(0, dtype=torch.int64),
    "one row": torch.tensor([3]),
    "one class": torch.tensor([1, 1, 1, 1]),
    "singletons": torch.tensor([1, 2, 3, 4]),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("labels", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_no_valid_anchor(labels: torch.Tensor, distance: str, reduction: str) -> None:
    x = torch.randn(len(labels), 3, requires_grad=True)
    result = reference.batch_hard_triplet_loss(
        x, labels, distance=distance, reduction=reduction, return_stats=True
    )
    assert torch.equal(result.loss, torch.zeros(len(labels) if reduction == "none" else ()))
    assert [t.item() for t in result[1:]] == [0] * 6
    (grad,) = torch.autograd.grad(result.loss.sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))
    assert mined(x, labels, distance=distance) == [[], [], []]


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("distance", DISTANCES)
def test_empty_reference_sets(distance: str, n: int, m: int) -> None:
    x, refs = torch.randn(n, 2, requires_grad=True), torch.randn(m, 2, requires_grad=True)
    loss = reference.batch_hard_triplet_loss(x, torch.arange(n), refs, torch.arange(m), distance=distance)
    assert loss.item() == 0
    grads = torch.autograd.grad(loss, (x, refs))
    assert torch.equal(grads[0], torch.zeros_like(x)) and torch.equal(grads[1], torch.zeros_like(refs))
    assert mined(x, torch.arange(n), refs, torch.arange(m), distance=distance) == [[], [], []]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_non_finite_embeddings_make_the_loss_nan(distance: str, reduction: str, value: float) -> None:
    options = {"distance": distance, "reduction": reduction}
    for labels in (torch.tensor([0, 0, 1, 1, 2]), torch.zeros(5, dtype=torch.int64), torch.arange(5)):
        x, refs = torch.randn(5, 3), torch.randn(4, 3)
        bad_x, bad_refs = x.clone(), refs.clone()
        bad_x[4, 1] = bad_refs[0, 2] = value
        for args in ((bad_x, labels), (bad_x, labels, refs, labels[:4]), (x, labels, bad_refs, labels[:4])):
            loss = reference.batch_hard_triplet_loss(*args, **options)
            assert loss.shape == ((5,) if reduction == "none" else ()) and loss.isnan().all()
        assert mined(bad_x, labels, distance=distance)[0] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", DISTANCES)
def test_halves_are_computed_in_float32(distance: str, dtype: torch.dtype) -> None:
    half = (torch.randn(12, 6) * 200).to(dtype).requires_grad_()  # squares beyond the range of float16
    single = half.detach().float().requires_grad_()
    labels = torch.arange(12) % 3
    loss = reference.batch_hard_triplet_loss(half, labels, distance=distance)
    expected = reference.batch_hard_triplet_loss(single, labels, distance=distance)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    loss.backward(), expected.backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, single.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_do_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    x, labels = torch.randn(6, 2).to(dtype), torch.arange(6) % 3
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            result = reference.batch_hard_triplet_loss(x, labels, return_stats=True)
            style = reference.style_loss(x[None], reference.gram_matrix(x[None]))
            content = reference.content_loss(x, x)
            contrastive = reference.contrastive_loss(x, x, labels > 1)
        finally:
            torch.set_default_dtype(torch.float32)
        assert [t.dtype for t in result] == [expected, *[torch.int64] * 3, *[expected] * 3]
        assert {style.dtype, content.dtype, contrastive.dtype} == {expected}


# ---- contrastive -------------------------------------------------------------------------------------------


def test_contrastive_by_hand() -> None:
    # d: 5, 5, 0, 0; with margin 6 the dissimilar ones cost 1 and 36
    x1 = torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]])
    x2 = torch.tensor([[3.0, 4], [3, 4], [1, 1], [1, 1]])
    y = torch.tensor([1, 0, 1, 0])
    for reduction, expected in (("none", [25.0, 1.0, 0.0, 36.0]), ("sum", 62.0), ("mean", 15.5)):
        loss = reference.contrastive_loss(x1, x2, y, margin=6, reduction=reduction)
        assert loss.tolist() == expected
    assert reference.contrastive_loss(x1, x2, y, reduction="none").tolist() == [25, 0, 0, 1]


def test_contrastive_gradients_and_limits() -> None:
    x1 = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    x2 = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    assert gradcheck(lambda a, b: reference.contrastive_loss(a, b, y, margin=5), (x1, x2))
    assert gradgradcheck(lambda a, b: reference.contrastive_loss(a, b, y, margin=5), (x1, x2))
    (grad,) = torch.autograd.grad(reference.contrastive_loss(x1, x1.detach(), y, margin=5), x1)
    assert torch.equal(grad, torch.zeros_like(grad))
    empty = torch.zeros(0, 3)
    assert reference.contrastive_loss(empty, empty, torch.zeros(0)).item() == 0


# ---- Gram, style, content ----------------------------------------------------------------------------------

# Two samples, C = 2, N = 4 as 2 x 2; the second is zero. F F^T = [[30, 6], [6, 2]] and 0.
FEATURES = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 1], [0, 1]]], [[[0, 0], [0, 0]], [[0, 0], [0, 0]]]])
# Differences [[2, 0], [1, 0]] and [[0, -1], [1, 0]]: squares sum to 7, absolute values to 5.
RAW_TARGET = torch.tensor([[[28.0, 6], [5, 2]], [[0, 1], [-1, 0]]])
SCALES = {"none": 1.0, "hw": 1 / 4, "chw": 1 / 8, "bchw": 1 / 16, 5.0: 1 / 5}


@pytest.mark.parametrize("normalize", SCALES)
def test_gram_by_hand(normalize: str | float) -> None:
    gram = reference.gram_matrix(FEATURES, normalize=normalize)
    expected = torch.tensor([[[30.0, 6], [6, 2]], [[0, 0], [0, 0]]]) * SCALES[normalize]
    torch.testing.assert_close(gram, expected)
    for shape in ((2, 2, 4), (2, 2, 4, 1), (2, 2, 1, 2, 2)):
        assert torch.equal(reference.gram_matrix(FEATURES.reshape(shape), normalize=normalize), gram)


def test_gram_defaults_to_chw() -> None:
    assert torch.equal(reference.gram_matrix(FEATURES), reference.gram_matrix(FEATURES, normalize="chw"))


@pytest.mark.parametrize(
    ("preset", "normalize", "reduction", "distance", "expected"),
    [
        ("gatys_paper", "none", "gatys", "l2", 7 / (4 * 2**2 * 4**2)),
        ("ng_course", "none", "gatys", "l2", 7 / (2 * 2 * 2 * 2) ** 2),
        ("sum", "none", "sum", "l2", 7.0),
        ("pytorch_tutorial", "bchw", "mean", "l2", 7 / 16**2 / 8),
        ("jcjohnson", "chw", "mean", "l2", 7 / 8**2 / 8),
        ("pystiche", "hw", "mean", "l2", 7 / 4**2 / 8),
        ("piq", "none", "mean", "l2", 7 / 8),
        ("basicsr", "chw", "mean", "l1", 5 / 8 / 8),
        ("edgeconnect", "chw", "mean", "l1", 5 / 8 / 8),
        ("film", 255.0**2 * 4, "mean", "l2", 7 / (255.0**2 * 4) ** 2 / 8),
    ],
)
def test_style_presets_by_hand(
    preset: str, normalize: str | float, reduction: str, distance: str, expected: float
) -> None:
    scale = SCALES[normalize] if isinstance(normalize, str) else 1 / normalize
    loss = reference.style_loss(
        FEATURES.double(),
        RAW_TARGET.double() * scale,
        normalize=normalize,
        reduction=reduction,
        distance=distance,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_style_defaults_are_chw_mean_l2() -> None:
    assert reference.style_loss(FEATURES, RAW_TARGET / 8).item() == pytest.approx(7 / 8**2 / 8)


def test_style_targets_broadcast_over_the_batch() -> None:
    one = RAW_TARGET[
        0
    ]  # against it the samples differ by [[2, 0], [1, 0]] and by itself: 5 + (28^2+6^2+5^2+2^2)
    for target in (one, one[None], one.expand(2, 2, 2)):
        loss = reference.style_loss(FEATURES, target, normalize="none", reduction="sum")
        assert loss.item() == 5 + 784 + 36 + 25 + 4


def test_layers_add_up_by_weights() -> None:
    second = torch.tensor([[[1.0, 1, 0], [0, 2, 2], [3, 0, 0]]])
    gram = torch.tensor([[2.0, 2, 3], [2, 8, 0], [3, 0, 9]])
    assert torch.equal(reference.gram_matrix(second, normalize="none")[0], gram)
    options = {"normalize": "none", "reduction": "sum"}
    layers, targets = [FEATURES, second], (RAW_TARGET, torch.zeros(3, 3))
    squares = 4 + 4 + 9 + 4 + 64 + 9 + 81
    assert reference.style_loss(layers, targets, **options).item() == 7 + squares
    assert reference.style_loss(layers, targets, weights=[2, -0.5], **options).item() == 14 - squares / 2
    assert reference.style_loss(FEATURES, RAW_TARGET, weights=(3,), **options).item() == 21
    assert reference.content_loss([second, gram], [second - 1, gram + 2], weights=[1, 10]).item() == 41


def test_content_by_hand() -> None:
    features, target = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 0], [0, 4]])  # squares 4 and 9
    for reduction, expected in (("mean", 13 / 4), ("sum", 13.0), ("gatys", 6.5)):
        assert reference.content_loss(features, target, reduction=reduction).item() == expected


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 2, 3), (2, 2, 2, 1, 3)])
def test_gram_and_style_equal_loops(shape: tuple[int, ...]) -> None:
    features = torch.randn(shape, dtype=torch.float64)
    b, c, n = shape[0], shape[1], math.prod(shape[2:])
    f = features.reshape(b, c, n).tolist()
    target = torch.randn(b, c, c, dtype=torch.float64)
    total_l2 = total_l1 = 0.0
    gram = reference.gram_matrix(features)
    for s in range(b):
        for i in range(c):
            for j in range(c):
                g = sum(f[s][i][k] * f[s][j][k] for k in range(n)) / (c * n)
                assert gram[s, i, j].item() == pytest.approx(g, rel=1e-12, abs=1e-14)
                total_l2 += (g - target[s, i, j].item()) ** 2
                total_l1 += abs(g - target[s, i, j].item())
    for distance, total in (("l2", total_l2), ("l1", total_l1)):
        for reduction, factor in (("mean", b * c * c), ("sum", 1), ("gatys", 4 * c**2 * n**2)):
            loss = reference.style_loss(features, target, reduction=reduction, distance=distance)
            assert loss.item() == pytest.approx(total / factor, rel=1e-12)


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_style_gradients(distance: str) -> None:
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)

    def loss(f: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return reference.style_loss([f, f], [t, t[None]], weights=[1, 2], distance=distance)

    assert gradcheck(loss, (features, target)) and gradgradcheck(loss, (features, target))
    assert gradcheck(reference.gram_matrix, features) and gradgradcheck(reference.gram_matrix, features)
    other = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(reference.content_loss, (features, other))
    assert gradgradcheck(reference.content_loss, (features, other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_of_features_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    features = (
        (torch.randn(1, 3, 64) * 200).to(dtype).requires_grad_()
    )  # F F^T is beyond the range of float16
    gram = reference.gram_matrix(features, normalize="none")
    assert torch.equal(gram, reference.gram_matrix(features.float(), normalize="none"))
    loss = reference.style_loss(features, torch.zeros(3, 3), normalize="none")
    loss.backward()
    assert loss.dtype == gram.dtype == torch.float32 and features.grad.dtype == dtype
    half_target = torch.ones(3, 3, dtype=dtype, requires_grad=True)
    reference.style_loss(features, half_target).backward()
    assert half_target.grad.dtype == dtype


def test_nan_features_make_the_loss_nan() -> None:
    bad = FEATURES.clone()
    bad[0, 0, 0, 0] = math.nan
    for distance in ("l2", "l1"):
        assert reference.style_loss(bad, RAW_TARGET, distance=distance).isnan()
    assert reference.content_loss(bad, FEATURES).isnan()


# ---- transforms --------------------------------------------------------------------------------------------


def test_autocast_leaves_arithmetic_alone_and_promotes_mixes() -> None:
    x, labels, features = torch.randn(8, 4), torch.arange(8) % 3, torch.randn(2, 3, 5)
    target = torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram = reference.gram_matrix(features)
        mixed = reference.batch_hard_triplet_loss(x, labels, x.bfloat16(), labels)
        style = reference.style_loss(features.bfloat16(), target.double())
        content = reference.content_loss(features, features.bfloat16())
    assert torch.equal(gram, reference.gram_matrix(features))
    assert torch.equal(mixed, reference.batch_hard_triplet_loss(x, labels, x.bfloat16().float(), labels))
    assert torch.equal(style, reference.style_loss(features.bfloat16().double(), target.double()))
    assert torch.equal(content, reference.content_loss(features, features.bfloat16().float()))


def test_compile_and_vmap() -> None:
    x, labels, features = torch.randn(2, 8, 4), torch.arange(16).reshape(2, 8) % 3, torch.randn(2, 3, 5)
    compiled = torch.compile(
        reference.batch_hard_triplet_loss, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    each = [reference.batch_hard_triplet_loss(a, b) for a, b in zip(x, labels, strict=True)]
    torch.testing.assert_close(compiled(x[0], labels[0]), each[0])
    torch.testing.assert_close(
        compiled(x[0, :5], labels[0, :5]), reference.batch_hard_triplet_loss(x[0, :5], labels[0, :5])
    )
    torch.testing.assert_close(torch.vmap(reference.batch_hard_triplet_loss)(x, labels), torch.stack(each))
    style = torch.compile(reference.style_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(
        style(features, torch.ones(3, 3)), reference.style_loss(features, torch.ones(3, 3))
    )


# ---- independence ------------------------------------------------------------------------------------------


def test_the_reference_needs_nothing_compiled() -> None:
    package = Path(reference.__file__).parent.parent
    code = f"""
import sys, types
package = types.ModuleType("deepsim_ext")  # stands in for __init__.py, which imports the compiled module
package.__path__ = [{str(package)!r}]
sys.modules["deepsim_ext"] = package
import torch
from deepsim_ext import reference
x, labels = torch.randn(6, 2), torch.arange(6) % 2
reference.batch_hard_triplet_loss(x, labels), reference.batch_hard_mine(x, labels)
reference.style_loss(x[None], reference.gram_matrix(x[None]))
reference.content_loss(x, x), reference.contrastive_loss(x, x, labels), reference.triplet_margin_loss(x, x, x)
reference.batch_all_triplet_loss(x, labels), reference.batch_semi_hard_triplet_loss(x, labels)
reference.batch_contrastive_loss(x, labels), reference.nearest_neighbors(x, None, 2)
print(*{{".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("deepsim_ext")}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = ["deepsim_ext", "deepsim_ext._checks", "deepsim_ext.reference", "deepsim_ext.results"]
    assert sorted(done.stdout.split()) == expected
