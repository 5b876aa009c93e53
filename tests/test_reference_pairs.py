"""The reference's losses of all triplets and all pairs, and its neighbours: by hand, by loops, by others."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import ContrastiveLoss, TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch.autograd import gradcheck, gradgradcheck

from deepsim_ext import reference
from deepsim_ext.results import ContrastiveResult, TripletLossResult

DISTANCES = ("euclidean", "sqeuclidean", "cosine")
REDUCTIONS = ("mean", "mean_nonzero", "sum")

LOSSES = {
    "batch_all": (reference.batch_all_triplet_loss, {}),
    "facenet": (reference.batch_semi_hard_triplet_loss, {}),
    "facenet_soft": (reference.batch_semi_hard_triplet_loss, {"soft": True}),
    "pml": (reference.batch_semi_hard_triplet_loss, {"definition": "pml", "margin": 0.7}),
    "contrastive": (reference.batch_contrastive_loss, {"pos_margin": 0.1, "neg_margin": 2.0}),
    "contrastive_squared": (reference.batch_contrastive_loss, {"squared": True, "neg_margin": 2.0}),
}
by_loss = pytest.mark.parametrize(("loss", "options"), LOSSES.values(), ids=LOSSES.keys())
by_distance = pytest.mark.parametrize("distance", DISTANCES)
by_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def line(*points: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Points on a line, [N, 1]: their distances can be read off."""
    return torch.tensor(points, dtype=dtype)[:, None]


LINE = line(0, 3, 1, 7)
LABELS = torch.tensor([0, 0, 1, 1])
# (a, p, n)  d_ap - d_an        (a, p, n)  d_ap - d_an
#  0  1  2   3 - 1 =  2          2  3  0   6 - 1 =  5
#  0  1  3   3 - 7 = -4          2  3  1   6 - 2 =  4
#  1  0  2   3 - 2 =  1          3  2  0   6 - 7 = -1
#  1  0  3   3 - 4 = -1          3  2  1   6 - 4 =  2


def numbers(result: tuple[torch.Tensor, ...]) -> list[float]:
    return [t.item() for t in result]


# ---- batch-all, by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"margin": 1.5}, 22.5 / 7),
        ({"margin": 1.5, "reduction": "mean"}, 22.5 / 8),
        ({"margin": 1.5, "reduction": "sum"}, 22.5),
        ({}, (2 + 1 + 5 + 4 + 2) / 5 + 0.2),
        ({"margin": 1, "reduction": "mean_nonzero"}, (3 + 2 + 6 + 5 + 3) / 5),  # -1 + margin is not active
        ({"margin": 0, "distance": "sqeuclidean", "reduction": "sum"}, 8.0 + 5 + 35 + 32 + 20),
    ],
)
def test_batch_all_by_hand(options: dict, expected: float) -> None:
    loss = reference.batch_all_triplet_loss(LINE, LABELS, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_batch_all_statistics_by_hand() -> None:
    result = reference.batch_all_triplet_loss(LINE, LABELS, margin=1.5, reduction="sum", return_stats=True)
    assert isinstance(result, TripletLossResult)
    assert numbers(result) == [22.5, 4, 8, 7, 7 / 8, (4 * 3 + 4 * 6) / 8, (1 + 7 + 2 + 4 + 1 + 2 + 7 + 4) / 8]


def test_batch_all_gradient_by_hand() -> None:
    x = LINE.clone().requires_grad_()
    reference.batch_all_triplet_loss(x, LABELS, margin=0, reduction="sum").backward()
    # Of |x0-x1| - |x0-x2|, |x1-x0| - |x1-x2|, |x2-x3| - |x2-x0|, |x2-x3| - |x2-x1| and |x3-x2| - |x3-x1|.
    assert x.grad.flatten().tolist() == [0, 1 + 1 - 1 - 1 + 1, -1 + 1 - 1 - 1 - 1 + 1 - 1, 3 - 1]


def test_batch_all_with_references_by_hand() -> None:
    x, labels = line(0, 10, 5), torch.tensor([0, 1, 7])
    refs, ref_labels = line(0, 4, -1, 8), torch.tensor([0, 0, 1, 1])
    # Anchor 0: positives 0 and 4 away, negatives 1 and 8. Anchor 1: 11 and 2; 10 and 6. Anchor 2: none.
    gaps = [0 - 1, 0 - 8, 4 - 1, 4 - 8, 11 - 10, 11 - 6, 2 - 10, 2 - 6]
    for margin in (0.0, 2.5):
        result = reference.batch_all_triplet_loss(
            x, labels, refs, ref_labels, margin=margin, reduction="sum", return_stats=True
        )
        losses = [max(0.0, gap + margin) for gap in gaps]
        assert numbers(result)[:4] == [sum(losses), 2, 8, sum(v > 0 for v in losses)]


# ---- semi-hard, by hand ------------------------------------------------------------------------------------
# Negatives that "facenet" takes: anchor 0: row 3, 7 away; anchor 1: row 3, 4 away; anchor 2: both are nearer
# than its positive, so the farther of them, row 1, 2 away; anchor 3: row 0, 7 away. Gaps: -4, -1, 4, -1.


@pytest.mark.parametrize("definition", ["facenet", "tfa"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"margin": 1.5}, (0.5 + 5.5 + 0.5) / 4),
        ({}, 4.2 / 4),
        ({"margin": 1.5, "reduction": "mean_nonzero"}, 6.5 / 3),
        ({"margin": 1.5, "reduction": "sum"}, 6.5),
        ({"margin": 5, "distance": "sqeuclidean", "reduction": "sum"}, 36 - 4 + 5.0),
        (
            {"soft": True, "margin": 9, "reduction": "sum"},
            sum(math.log1p(math.exp(z)) for z in (-4, -1, 4, -1)),
        ),
    ],
)
def test_semi_hard_by_hand(options: dict, expected: float, definition: str) -> None:
    loss = reference.batch_semi_hard_triplet_loss(LINE, LABELS, definition=definition, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_semi_hard_statistics_by_hand() -> None:
    result = reference.batch_semi_hard_triplet_loss(LINE, LABELS, margin=1.5, return_stats=True)
    assert isinstance(result, TripletLossResult)
    assert numbers(result) == [6.5 / 4, 4, 4, 3, 3 / 4, (3 + 3 + 6 + 6) / 4, (7 + 4 + 2 + 7) / 4]


def test_facenet_is_the_default_definition() -> None:
    loss = reference.batch_semi_hard_triplet_loss(LINE, LABELS)
    assert torch.equal(loss, reference.batch_semi_hard_triplet_loss(LINE, LABELS, definition="facenet"))


@pytest.mark.parametrize(
    ("margin", "losses"),
    [(0.5, []), (1, [0, 0]), (1.5, [0.5, 0.5]), (4, [0, 3, 3]), (5, [1, 4, 4])],  # gaps -1 and -1, then -4
)
def test_pml_takes_the_triplets_inside_the_margin(margin: float, losses: list[float]) -> None:
    for reduction in REDUCTIONS:
        result = reference.batch_semi_hard_triplet_loss(
            LINE, LABELS, margin=margin, definition="pml", reduction=reduction, return_stats=True
        )
        active = sum(v > 0 for v in losses)
        count = {"mean": len(losses), "mean_nonzero": active, "sum": 1}[reduction]
        assert numbers(result)[:4] == [pytest.approx(sum(losses) / max(count, 1)), 4, len(losses), active]
    d_ap, d_an = [[3, 6], [3, 3, 6]][len(losses) > 2], [[4, 7], [7, 4, 7]][len(losses) > 2]
    if losses:
        assert numbers(result)[5:] == [pytest.approx(sum(d) / len(losses)) for d in (d_ap, d_an)]


def test_a_negative_as_far_as_the_positive_is_not_farther() -> None:
    x, labels = line(0, 1, -1), torch.tensor([0, 0, 1])
    # Anchor 0: d_ap = d_an = 1; anchor 1: 1 and 2.
    result = reference.batch_semi_hard_triplet_loss(
        x, labels, margin=1.5, definition="pml", return_stats=True
    )
    assert numbers(result) == [0.5, 2, 1, 1, 1, 1, 2]
    # "facenet" passes over the negative at 1 for the one at 3.
    x, labels = line(0, 1, -1, 3), torch.tensor([0, 0, 1, 2])
    refs = (x[1:], labels[1:])
    result = reference.batch_semi_hard_triplet_loss(x[:1], labels[:1], *refs, margin=2.5, return_stats=True)
    assert numbers(result) == [0.5, 1, 1, 1, 1, 1, 3]


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ((1, 2, -2, 2), 1),  # nearest farther: three at 2
        ((1, 0.5, -2, 2), 2),  # two at 2
        ((10, 2, -2, 1), 1),  # none is farther; farthest: two at 2
        ((10, 1, -2, 2), 2),
    ],
)
def test_semi_hard_ties_go_to_the_lowest_index(points: tuple[float, ...], chosen: int) -> None:
    refs = line(*points).requires_grad_()
    reference.batch_semi_hard_triplet_loss(
        line(0), torch.tensor([0]), refs, torch.arange(4), margin=100
    ).backward()
    assert refs.grad.flatten().nonzero().flatten().tolist() == [0, chosen]


@by_distance
def test_semi_hard_ties_in_long_rows_go_to_the_lowest_index(distance: str) -> None:
    anchor = torch.randn(1, 17)
    positive, negative = anchor + 0.1 * torch.randn(1, 17), anchor + torch.randn(1, 17)
    refs = torch.cat([positive, negative.expand(100, 17)]).requires_grad_()
    ref_labels = torch.arange(101).clamp(max=50)
    reference.batch_semi_hard_triplet_loss(
        anchor, torch.tensor([0]), refs, ref_labels, margin=100, distance=distance
    ).backward()
    assert refs.grad.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 1]


def test_float64_gaps_below_float32_rounding_decide() -> None:
    x = line(0, 1, 1 + 1e-12, 1 - 1e-12, dtype=torch.float64)[:, [0, 0]]
    refs = x[1:].clone().requires_grad_()
    for definition in ("facenet", "pml"):
        result = reference.batch_semi_hard_triplet_loss(
            x[:1], torch.tensor([0]), refs, torch.arange(3), definition=definition, return_stats=True
        )
        (grad,) = torch.autograd.grad(result.loss, refs)
        assert result.triplets.item() == 1
        assert grad.abs().sum(dim=1).nonzero().flatten().tolist() == [0, 1]


def test_float32_choices_are_those_of_float64() -> None:
    # Distances near 1e4 whose differences, of 1e-4, are below their rounding to float32.
    x = torch.tensor([[0.0, 0], [1e4, 0.5], [1e4, 1.5], [1e4, 1.0]])
    refs = x[1:].clone().requires_grad_()
    for ref_labels, chosen in (
        ([0, 1, 2], 2),
        ([1, 2, 0], 1),
        ([2, 0, 1], 2),
    ):  # farther: 1.5 over 1.0 over 0.5
        loss = reference.batch_semi_hard_triplet_loss(
            x[:1], torch.tensor([0]), refs, torch.tensor(ref_labels), margin=1.0
        )
        (grad,) = torch.autograd.grad(loss, refs)
        rows = grad.abs().sum(dim=1).nonzero().flatten().tolist()
        assert rows == sorted([ref_labels.index(0), chosen])


def tfa_semi_hard(x: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """(semi-hard, hard) of TensorFlow Addons, margin 1; there the maximum of nothing is the row's minimum."""
    d = torch.cdist(x, x).tolist()
    semi_hard, hard, pairs = 0.0, 0.0, 0
    for a, row in enumerate(d):
        negatives = [v for v, label in zip(row, labels, strict=True) if label != labels[a]]
        positives = [v for j, v in enumerate(row) if labels[j] == labels[a] and j != a]
        for d_ap in positives:
            farther = [v for v in negatives if v > d_ap]
            d_an = min(farther) if farther else max(negatives, default=min(row))
            semi_hard += max(0.0, d_ap - d_an + 1)
            pairs += 1
        hard += max(0.0, max(positives, default=min(row)) - min(negatives, default=max(row)) + 1)
    return semi_hard / pairs, hard / len(x)


def test_tfa_is_tensorflow_addons_wherever_there_is_a_negative() -> None:
    corner, same = torch.tensor([[0.0, 1], [1, 0]]), torch.tensor([0, 0])
    assert tfa_semi_hard(corner, same) == (pytest.approx(2.4142137), 1.0)  # published values
    options = {"margin": 1, "definition": "tfa"}
    assert (
        reference.batch_semi_hard_triplet_loss(corner, same, **options).item() == 0
    )  # no negative, no triplet
    for seed in range(5):
        torch.manual_seed(seed)
        x, labels = torch.randn(15, 3, dtype=torch.float64), torch.arange(15) % (seed + 2)
        loss = reference.batch_semi_hard_triplet_loss(x, labels, **options)
        assert loss.item() == pytest.approx(tfa_semi_hard(x, labels)[0], rel=1e-12)


# ---- contrastive, by hand ----------------------------------------------------------------------------------
# Ordered positive pairs: 3, 3, 6, 6. Ordered negative pairs: 1, 7, 2, 4 and the same again.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 4.5),  # no negative pair is nearer than 1
        ({"reduction": "sum"}, 18.0),
        ({"reduction": "mean"}, 18 / 12),
        ({"neg_margin": 3}, 4.5 + (2 + 1) / 2),
        ({"neg_margin": 3, "pos_margin": 3}, 3.0 + 1.5),  # the pairs at 3 cost nothing and do not count
        ({"neg_margin": 3, "pos_margin": 3, "reduction": "mean"}, (2 * 3 + 2 * 2 + 2 * 1) / 12),
        ({"neg_margin": 3, "pos_margin": 3, "reduction": "sum"}, 12.0),
        ({"neg_margin": 3, "pos_margin": 3, "squared": True, "reduction": "sum"}, 2.0 * (9 + 4 + 1)),
        ({"neg_margin": 3, "squared": True}, (9 + 36) / 2 + (4 + 1) / 2),
        ({"neg_margin": 5, "distance": "sqeuclidean", "reduction": "sum"}, 2.0 * (9 + 36) + 2 * (4 + 1)),
    ],
)
def test_contrastive_by_hand(options: dict, expected: float) -> None:
    loss = reference.batch_contrastive_loss(LINE, LABELS, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_contrastive_statistics_by_hand() -> None:
    result = reference.batch_contrastive_loss(
        LINE, LABELS, pos_margin=3, neg_margin=3, reduction="sum", return_stats=True
    )
    assert isinstance(result, ContrastiveResult)
    assert numbers(result) == [12, 4, 8, 2, 4, 4.5, 3.5]


def test_contrastive_with_references_by_hand() -> None:
    x, labels = line(0, 10), torch.tensor([0, 1])
    refs, ref_labels = line(0, 3, 8), torch.tensor([0, 0, 1])
    # Positive pairs: 0, 3; 2. Negative pairs: 8; 10, 7.
    result = reference.batch_contrastive_loss(
        x, labels, refs, ref_labels, neg_margin=9, reduction="sum", return_stats=True
    )
    assert numbers(result) == [pytest.approx(v) for v in (3 + 2 + 1 + 2, 3, 3, 2, 2, 5 / 3, 25 / 3)]


def test_contrastive_of_the_batch_is_that_of_its_pairs() -> None:
    x, labels = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 4
    a, b = (t.flatten() for t in torch.meshgrid(torch.arange(9), torch.arange(9), indexing="ij"))
    a, b = a[a != b], b[a != b]
    pairs = reference.contrastive_loss(x[a], x[b], labels[a] == labels[b], margin=2, reduction="sum")
    batch = reference.batch_contrastive_loss(x, labels, neg_margin=2, squared=True, reduction="sum")
    torch.testing.assert_close(batch, pairs)


# ---- against loops -----------------------------------------------------------------------------------------


def loop_distance(a: list[float], b: list[float], distance: str) -> float:
    if distance == "cosine":
        norms = math.hypot(*a) * math.hypot(*b)
        return 1 - sum(p * q for p, q in zip(a, b, strict=True)) / norms if norms else 1.0
    d = math.dist(a, b)
    return d if distance == "euclidean" else d * d


def loop_rows(
    x: torch.Tensor,
    labels: torch.Tensor,
    refs: torch.Tensor | None,
    ref_labels: torch.Tensor | None,
    distance: str,
) -> Iterator[tuple[list[float], list[float]]]:
    """Distances (of positives, of negatives) of every anchor."""
    rows, row_labels = (x, labels) if refs is None else (refs, ref_labels)
    for i, a in enumerate(x.tolist()):
        d = [loop_distance(a, b, distance) for b in rows.tolist()]
        others = [j for j in range(len(d)) if refs is not None or i != j]
        yield (
            [d[j] for j in others if row_labels[j] == labels[i]],
            [d[j] for j in others if row_labels[j] != labels[i]],
        )


def loop_triplets(kind: str, margin: float, rows: list[tuple[list[float], list[float]]]) -> list[tuple]:
    """(d_ap, d_an) of every triplet."""
    triplets = []
    for positives, negatives in rows:
        for d_ap in positives:
            if kind == "facenet" and negatives:
                triplets.append((d_ap, min((v for v in negatives if v > d_ap), default=max(negatives))))
            elif kind != "facenet":
                triplets += [(d_ap, v) for v in negatives if kind == "all" or 0 < v - d_ap <= margin]
    return triplets


def loop_mean(losses: list[float], reduction: str) -> float:
    count = {"mean": len(losses), "mean_nonzero": sum(v > 0 for v in losses), "sum": 1}[reduction]
    return sum(losses) / max(count, 1)


def batches() -> Iterator[tuple[torch.Tensor | None, ...]]:
    """(embeddings, labels, ref_embeddings, ref_labels), float64: from one class to more than rows."""
    for seed, classes in ((0, 1), (1, 3), (2, 8), (3, 40)):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(13, 4, generator=g, dtype=torch.float64) + 0.5
        x[3] = 0
        x[5] = x[4]
        refs = torch.randn(9, 4, generator=g, dtype=torch.float64)
        labels, ref_labels = (torch.randint(classes, (n,), generator=g) for n in (13, 9))
        yield x, labels, None, None
        yield x, labels, refs, ref_labels


@by_distance
@by_reduction
def test_triplet_losses_equal_loops(reduction: str, distance: str) -> None:
    for batch in batches():
        rows = list(loop_rows(*batch, distance))
        for margin in (0.3, 1.0):
            for kind, f, extra in (
                ("all", reference.batch_all_triplet_loss, {}),
                ("facenet", reference.batch_semi_hard_triplet_loss, {}),
                ("facenet", reference.batch_semi_hard_triplet_loss, {"soft": True}),
                ("pml", reference.batch_semi_hard_triplet_loss, {"definition": "pml"}),
            ):
                triplets = loop_triplets(kind, margin, rows)
                losses = [
                    math.log1p(math.exp(p - n)) if extra.get("soft") else max(0.0, p - n + margin)
                    for p, n in triplets
                ]
                got = f(
                    *batch, margin=margin, distance=distance, reduction=reduction, return_stats=True, **extra
                )
                count = max(len(triplets), 1)
                expected = [
                    loop_mean(losses, reduction),
                    sum(bool(p and n) for p, n in rows),
                    len(triplets),
                    sum(v > 0 for v in losses),
                    sum(v > 0 for v in losses) / count,
                    sum(p for p, _ in triplets) / count,
                    sum(n for _, n in triplets) / count,
                ]
                assert numbers(got) == pytest.approx(expected, rel=1e-11, abs=1e-12), (kind, extra)


@by_distance
@by_reduction
@pytest.mark.parametrize("squared", [False, True])
def test_contrastive_equals_loops(squared: bool, reduction: str, distance: str) -> None:
    power = 2 if squared else 1
    for batch in batches():
        rows = list(loop_rows(*batch, distance))
        d_positive, d_negative = ([d for row in rows for d in row[side]] for side in (0, 1))
        positives = [max(0.0, d - 0.2) ** power for d in d_positive]
        negatives = [max(0.0, 1.1 - d) ** power for d in d_negative]
        if reduction == "mean_nonzero":
            loss = loop_mean(positives, reduction) + loop_mean(negatives, reduction)
        else:
            loss = loop_mean(positives + negatives, reduction)
        got = reference.batch_contrastive_loss(
            *batch,
            pos_margin=0.2,
            neg_margin=1.1,
            squared=squared,
            distance=distance,
            reduction=reduction,
            return_stats=True,
        )
        expected = [loss, len(positives), len(negatives)]
        expected += [sum(v > 0 for v in losses) for losses in (positives, negatives)]
        expected += [sum(d) / max(len(d), 1) for d in (d_positive, d_negative)]
        assert numbers(got) == pytest.approx(expected, rel=1e-11, abs=1e-12)


# ---- against pytorch-metric-learning -----------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "power"), [("euclidean", 1), ("sqeuclidean", 2)])
def test_pytorch_metric_learning_computes_the_same(distance: str, power: int) -> None:
    lp = LpDistance(normalize_embeddings=False, power=power)
    for x, labels, refs, ref_labels in batches():
        x = x.clone().requires_grad_()
        other = {} if refs is None else {"ref_emb": refs, "ref_labels": ref_labels}
        batch, options = (x, labels, refs, ref_labels), {"distance": distance, "reduction": "mean_nonzero"}
        miner = TripletMarginMiner(margin=0.6, type_of_triplets="semihard", distance=lp)
        triplets = miner(x, labels, *other.values())
        triplet_loss = TripletMarginLoss(margin=0.6, distance=lp)
        theirs = [
            triplet_loss(x, labels, **other),
            triplet_loss(x, labels, triplets, **other),
            ContrastiveLoss(pos_margin=0.3, neg_margin=1.7, distance=lp)(x, labels, **other),
        ]
        semi_hard = reference.batch_semi_hard_triplet_loss(
            *batch, margin=0.6, definition="pml", return_stats=True, **options
        )
        assert semi_hard.triplets.item() == len(triplets[0])
        ours = [
            reference.batch_all_triplet_loss(*batch, margin=0.6, **options),
            semi_hard.loss,
            reference.batch_contrastive_loss(*batch, pos_margin=0.3, neg_margin=1.7, **options),
        ]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
            gradients = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (a, b))
            torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


# ---- gradients ---------------------------------------------------------------------------------------------


@by_loss
@by_distance
@by_reduction
@pytest.mark.parametrize("with_refs", [False, True])
def test_gradients(loss, options: dict, distance: str, reduction: str, with_refs: bool) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64, requires_grad=True)
    refs = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    labels, ref_labels = torch.tensor([0, 0, 1, 1, 2, 0]), torch.tensor([0, 1, 1, 2, 2])

    def f(x: torch.Tensor, refs: torch.Tensor | None = None) -> torch.Tensor:
        rest = (refs, ref_labels) if with_refs else ()
        return loss(x, labels, *rest, distance=distance, reduction=reduction, **options)

    inputs = (x, refs) if with_refs else (x,)
    assert f(*inputs) > 0
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@by_loss
@by_distance
def test_gradients_at_zero_distance(loss, options: dict, distance: str) -> None:
    x = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)  # everything coincides
    value = loss(x, torch.tensor([0, 0, 1, 1, 2]), distance=distance, **options)
    # Triplets cost margin or log 2, and "pml" has none; of the pairs the negative ones cost their margin.
    expected = {
        reference.batch_all_triplet_loss: 0.2,
        reference.batch_semi_hard_triplet_loss: math.log(2) if options.get("soft") else 0.2,
        reference.batch_contrastive_loss: 2.0 ** (2 if options.get("squared") else 1),
    }[loss]
    assert value.item() == pytest.approx(0.0 if options.get("definition") == "pml" else expected, rel=1e-14)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    assert torch.equal(grad, torch.zeros_like(grad))
    (second,) = torch.autograd.grad(grad.sum() + grad.square().sum(), x)
    assert second.isfinite().all()


@by_loss
def test_zero_vectors_are_at_cosine_distance_one_and_get_no_gradient(loss, options: dict) -> None:
    x = torch.tensor([[0.0, 0], [0, 0], [1, 0], [-2, 0.5]], requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    value = loss(x, labels, distance="cosine", **options)
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    assert torch.equal(grad[:2], torch.zeros(2, 2))
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.isfinite().all()


def test_dense_parts_are_the_public_losses() -> None:
    x, labels, refs, ref_labels = list(batches())[3]
    for sets in ((x, labels, None, None), (x, labels, refs, ref_labels)):
        common = {"distance": "sqeuclidean", "reduction": "sum"}
        pairs = [
            (
                reference.dense_batch_all(*sets, 0.3, False, *common.values()),
                reference.batch_all_triplet_loss(*sets, margin=0.3, **common),
            ),
            (
                reference.dense_batch_all(*sets, 0.3, True, *common.values()),
                reference.batch_semi_hard_triplet_loss(*sets, margin=0.3, definition="pml", **common),
            ),
            (
                reference.dense_semi_hard(*sets, 0.3, True, *common.values()),
                reference.batch_semi_hard_triplet_loss(*sets, margin=0.3, soft=True, **common),
            ),
            (
                reference.dense_contrastive(*sets, 0.3, 1.3, True, *common.values()),
                reference.batch_contrastive_loss(
                    *sets, pos_margin=0.3, neg_margin=1.3, squared=True, **common
                ),
            ),
        ]
        for dense, public in pairs:
            assert dense > 0 and torch.equal(dense, public)


# ---- limits ------------------------------------------------------------------------------------------------

DEGENERATE = {
    "empty": torch.zeros(0, dtype=torch.int64),
    "one row": torch.tensor([3]),
    "one class": torch.tensor([1, 1, 1, 1]),
    "singletons": torch.tensor([1, 2, 3, 4]),
}


@by_loss
@by_distance
@by_reduction
@pytest.mark.parametrize("labels", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_nothing_to_compare(loss, options: dict, distance: str, reduction: str, labels: torch.Tensor) -> None:
    x = (torch.randn(len(labels), 3) * 0.3).requires_grad_()  # nearer than the margins
    result = loss(x, labels, distance=distance, reduction=reduction, return_stats=True, **options)
    (grad,) = torch.autograd.grad(result.loss, x)
    if isinstance(result, TripletLossResult) or len(labels) < 2:
        assert numbers(result) == [0] * 7
        assert torch.equal(grad, torch.zeros_like(x))
    else:  # there are pairs, of one kind
        same = len(set(labels.tolist())) == 1
        assert numbers(result)[1:3] == ([12, 0] if same else [0, 12])
        assert result.loss > 0 and grad.isfinite().all() and grad.any()
        assert (result.mean_d_positive > 0) == same and (result.mean_d_negative > 0) != same


@by_loss
@by_distance
@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
def test_empty_reference_sets(loss, options: dict, distance: str, n: int, m: int) -> None:
    x, refs = torch.randn(n, 2, requires_grad=True), torch.randn(m, 2, requires_grad=True)
    result = loss(x, torch.arange(n), refs, torch.arange(m), distance=distance, return_stats=True, **options)
    assert numbers(result) == [0] * 7
    for grad, t in zip(torch.autograd.grad(result.loss, (x, refs)), (x, refs), strict=True):
        assert torch.equal(grad, torch.zeros_like(t))


@by_loss
@by_distance
@by_reduction
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_embeddings_make_loss_and_means_nan(
    loss, options: dict, distance: str, reduction: str, value: float
) -> None:
    options = {"distance": distance, "reduction": reduction, "return_stats": True} | options
    for labels in (torch.tensor([0, 0, 1, 1, 2]), torch.zeros(5, dtype=torch.int64), torch.arange(5)):
        x, refs = torch.randn(5, 3), torch.randn(4, 3)
        bad_x, bad_refs = x.clone(), refs.clone()
        bad_x[4, 1] = bad_refs[0, 2] = value
        nothing_good = (torch.full((5, 3), value), labels)
        against_references = ((bad_x, labels, refs, labels[:4]), (x, labels, bad_refs, labels[:4]))
        for args in ((bad_x, labels), nothing_good, *against_references):
            result = loss(*args, **options)
            assert result.loss.isnan() and result[-2].isnan() and result[-1].isnan()


@by_loss
@by_distance
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(loss, options: dict, distance: str, dtype: torch.dtype) -> None:
    half = (torch.randn(12, 6) * 200).to(dtype).requires_grad_()  # squares beyond the range of float16
    single = half.detach().float().requires_grad_()
    labels = torch.arange(12) % 3
    options = {"distance": distance, "return_stats": True} | options
    got, expected = (loss(x, labels, **options) for x in (half, single))
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert got.loss.dtype == torch.float32 and numbers(got) == numbers(expected)
    got.loss.backward(), expected.loss.backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, single.grad.to(dtype))


@by_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_and_gradients_of_results(loss, options: dict, dtype: torch.dtype) -> None:
    floating = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.randn(8, 2).to(dtype).requires_grad_()
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            result = loss(x, torch.arange(8) % 3, return_stats=True, **options)
        finally:
            torch.set_default_dtype(torch.float32)
        counts = 3 if isinstance(result, TripletLossResult) else 4
        assert [t.dtype for t in result] == [floating] + [torch.int64] * counts + [floating] * (6 - counts)
        assert [t.requires_grad for t in result] == [True] + [False] * 6


@by_loss
def test_the_embeddings_themselves_as_references_are_the_self_form(loss, options: dict) -> None:
    x, labels = torch.randn(7, 2), torch.arange(7) % 3
    options = {"reduction": "mean"} | options
    assert torch.equal(loss(x, labels, x, labels, **options), loss(x, labels, **options))
    # Of a copy, each row is a positive of its original.
    assert loss(x, labels, x.clone(), labels, **options) != loss(x, labels, **options)


@by_loss
def test_labels_beyond_32_bits(loss, options: dict) -> None:
    x = torch.randn(6, 2)
    labels = torch.tensor([5, 5, 5 + 2**32, 5 + 2**32, -(2**63), 2**63 - 1])
    assert torch.equal(loss(x, labels, **options), loss(x, torch.tensor([0, 0, 1, 1, 2, 3]), **options))


@by_loss
def test_compile_vmap_and_autocast(loss, options: dict) -> None:
    x, labels = torch.randn(2, 8, 4), torch.arange(16).reshape(2, 8) % 3

    def f(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(x, labels, **options)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 5):
        torch.testing.assert_close(compiled(x[0, :n], labels[0, :n]), f(x[0, :n], labels[0, :n]))
    each = torch.stack([f(a, b) for a, b in zip(x, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(f)(x, labels), each)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(f(x[0], labels[0]), each[0])


# ---- nearest neighbours ------------------------------------------------------------------------------------


def test_neighbors_by_hand() -> None:
    queries, gallery = line(0, 10), line(1, -1, 8, 12, 1)
    for distance, expected in (
        ("euclidean", [[1, 1, 1, 8, 12], [2, 2, 9, 9, 11]]),
        ("sqeuclidean", [[1, 1, 1, 64, 144], [4, 4, 81, 81, 121]]),
    ):
        for k in (1, 4, 5):
            result = reference.nearest_neighbors(queries, gallery, k, distance=distance)
            assert result.distances.tolist() == [row[:k] for row in expected]
            assert result.indices.tolist() == [[0, 1, 4, 2, 3][:k], [2, 3, 0, 4, 1][:k]]
            assert (result.distances.dtype, result.indices.dtype) == (torch.float32, torch.int64)


def test_no_row_is_its_own_neighbor() -> None:
    x = line(0, 1, 1, 5)
    for gallery in (None, x):
        distances, indices = reference.nearest_neighbors(x, gallery, 3)
        assert indices.tolist() == [[1, 2, 3], [2, 0, 3], [1, 0, 3], [1, 2, 0]]
        assert distances.tolist() == [[1, 1, 5], [0, 1, 4], [0, 1, 4], [4, 4, 5]]
    copy = reference.nearest_neighbors(x, x.clone(), 2)  # a copy is another gallery
    assert copy.indices.tolist() == [[0, 1], [1, 2], [1, 2], [3, 1]]
    too_far = line(0, 1e30, -1e30)[:, [0, 0]]  # for their squares
    assert reference.nearest_neighbors(too_far, None, 2).indices.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_cosine_neighbors_by_hand() -> None:
    queries = torch.tensor([[2.0, 0], [0, 0]])
    gallery = torch.tensor([[0.0, 0], [-1, 0], [3, 3], [5, 0]])
    distances, indices = reference.nearest_neighbors(queries, gallery, 4, distance="cosine")
    torch.testing.assert_close(distances, torch.tensor([[0, 1 - 0.5**0.5, 1, 2], [1, 1, 1, 1]]))
    assert indices.tolist() == [[3, 2, 0, 1], [0, 1, 2, 3]]


@by_distance
def test_neighbors_equal_loops(distance: str) -> None:
    queries, gallery = torch.randn(5, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    got = reference.nearest_neighbors(queries, gallery, 7, distance=distance)
    assert got.distances.dtype == torch.float64
    for i, q in enumerate(queries.tolist()):
        expected = sorted((loop_distance(q, g, distance), j) for j, g in enumerate(gallery.tolist()))[:7]
        assert got.indices[i].tolist() == [j for _, j in expected]
        assert got.distances[i].tolist() == pytest.approx([d for d, _ in expected], rel=1e-12, abs=1e-15)


def test_equal_neighbors_come_by_ascending_index_in_long_rows() -> None:
    gallery = torch.randn(3, 17).repeat(400, 1)
    indices = reference.nearest_neighbors(gallery[:3], gallery, 400).indices
    assert indices.tolist() == [list(range(i, 1200, 3)) for i in range(3)]


@by_distance
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_neighbors(distance: str, value: float) -> None:
    good = torch.zeros(4, 3)  # at cosine distance 1 from anything, even from inf
    bad = good.clone()
    bad[2, 1] = value
    for args in ((good, bad), (bad, good), (bad, None)):
        distances, indices = reference.nearest_neighbors(*args, 2, distance=distance)
        assert distances.isnan().all() and torch.equal(indices, torch.full((4, 2), -1))


def test_neighbors_of_halves_of_nothing_and_without_gradient() -> None:
    half = (torch.randn(6, 4) * 200).half().requires_grad_()  # squares beyond the range of float16
    got, expected = (reference.nearest_neighbors(x, None, 5) for x in (half, half.float()))
    assert torch.equal(got.distances, expected.distances) and torch.equal(got.indices, expected.indices)
    assert got.distances.dtype == torch.float32 and not got.distances.requires_grad
    nothing = reference.nearest_neighbors(torch.zeros(0, 4), torch.zeros(3, 4), 2)
    assert nothing.distances.shape == nothing.indices.shape == (0, 2)


def test_neighbors_under_compile_and_vmap() -> None:
    x = torch.randn(2, 9, 4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: reference.nearest_neighbors(x, None, 3), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    each = [reference.nearest_neighbors(t, None, 3) for t in x]
    for got, expected in (
        (compiled(x[0]), each[0]),
        (compiled(x[0, :6]), reference.nearest_neighbors(x[0, :6], None, 3)),
    ):
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    batched = torch.vmap(lambda t: tuple(reference.nearest_neighbors(t, None, 3)))(x)
    assert torch.equal(batched[1], torch.stack([e.indices for e in each]))
