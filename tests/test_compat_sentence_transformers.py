"""deepsim_ext.compat.sentence_transformers against the installed sentence-transformers.

Theirs is asked in float64, ours in float64 and float32 on the same values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from sentence_transformers.sentence_transformer import losses
from torch import nn

from deepsim_ext.compat import sentence_transformers as ours

from .samples import Sample, balanced_labels

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
METRICS = ("euclidean_distance", "eucledian_distance", "cosine_distance")
WITH_MARGIN = ("BatchHardTripletLoss", "BatchSemiHardTripletLoss", "BatchAllTripletLoss")
LOSSES = (*WITH_MARGIN, "BatchHardSoftMarginTripletLoss")
by_loss = pytest.mark.parametrize("name", LOSSES)


class Model(nn.Module):
    """In place of a SentenceTransformer: the features are the embeddings already."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["input"]}


def batches(dtype: torch.dtype = torch.float64) -> Iterator[Sample]:
    """(embeddings, labels), most in float32's values."""
    g = torch.Generator().manual_seed(34)

    def points(n: int, d: int, shift: float = 0.0) -> torch.Tensor:
        return (torch.randn(n, d, generator=g) + shift).to(dtype)

    def labels(n: int, classes: int) -> torch.Tensor:
        return torch.randint(classes, (n,), generator=g)

    yield Sample("random", [points(12, 3), labels(12, 3)])
    yield Sample("more_rows", [points(41, 8), labels(41, 6)])
    yield Sample("balanced", [points(64, 16), balanced_labels(64, 4, g)])
    yield Sample("far_apart", [points(30, 6) * 20, labels(30, 7)])
    yield Sample("with_singletons", [points(20, 4), labels(20, 14)])
    yield Sample("all_singletons", [points(9, 4), torch.arange(9)])
    yield Sample("one_class", [points(9, 4), torch.full((9,), 7)])
    yield Sample("one_against_all", [points(9, 4), (torch.arange(9) == 4).long()])
    yield Sample("two_of_a_kind", [points(2, 4), torch.zeros(2, dtype=torch.int64)])
    yield Sample("two_kinds", [points(2, 4), torch.arange(2)])
    yield Sample("one_row", [points(1, 4), torch.arange(1)])
    yield Sample("equal_rows", [torch.ones(8, 3, dtype=dtype), torch.arange(8) // 2])
    yield Sample("equal_rows_of_one_class", [torch.ones(8, 3, dtype=dtype), torch.arange(8) // 8])
    # On a grid, where also theirs computes squared distances without rounding.
    yield Sample("duplicates", [points(8, 5).mul(4).round().repeat(4, 1), labels(32, 5)])
    yield Sample("zero_rows", [points(9, 4) * (torch.arange(9) % 3 > 0)[:, None], labels(9, 3)])
    yield Sample("offset", [points(24, 8, 100.0), labels(24, 5)])
    yield Sample("strange_labels", [points(12, 4), labels(12, 3) * 2**40 - 2**41])
    yield Sample("int32_column_of_labels", [points(12, 4), labels(12, 3).int()[:, None]])


def evaluate(module, name, metric, sample, dtype, **options):
    """Loss and gradient on one batch."""
    distance = getattr(module.BatchHardTripletLossDistanceFunction, metric)
    x = sample.tensors[0].to(dtype, copy=True).requires_grad_()
    loss = getattr(module, name)(Model(), distance, **options)([{"input": x}], sample.tensors[1])
    loss.backward()
    return loss.detach(), x.grad


@by_dtype
@by_loss
@pytest.mark.parametrize("metric", METRICS)
def test_loss_and_gradient(metric, name, dtype):
    margins = ({},) if name not in WITH_MARGIN else ({}, {"margin": 0.3}, {"margin": 1.7})
    for sample in batches():
        if metric == "cosine_distance" and sample.name in ("zero_rows", "duplicates"):
            continue  # zero vectors, see below; copies, which theirs has at distances of 1e-16, not at 0
        for margin in margins:
            got, gradient = evaluate(ours, name, metric, sample, dtype, **margin)
            expected, expected_gradient = evaluate(losses, name, metric, sample, torch.float64, **margin)
            assert got.dtype == dtype
            case = f"{sample.name} {margin}"
            rtol = TOLERANCE[dtype]
            torch.testing.assert_close(
                got.double(),
                expected,
                rtol=rtol,
                atol=rtol * 1e-2,
                msg=lambda text, case=case: f"{case}: {text}",
            )
            difference = (gradient.double() - expected_gradient).norm()
            assert difference <= rtol * expected_gradient.norm() + rtol * 1e-4, case


@by_dtype
@by_loss
def test_ties_of_rows_that_differ(name, dtype):
    """On a grid: the loss only, as each side has the gradient of one of the rows that tie."""
    g = torch.Generator().manual_seed(35)
    rows = torch.randn(30, 2, generator=g).round()
    sample = Sample("", [rows, torch.randint(4, (30,), generator=g)])
    got, _ = evaluate(ours, name, "euclidean_distance", sample, dtype)
    expected, _ = evaluate(losses, name, "euclidean_distance", sample, torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=0)


@by_loss
def test_defaults_and_configuration(name):
    (sample, *_) = batches(torch.float32)
    results = []
    for module in (ours, losses):
        loss = getattr(module, name)(Model())
        results.append(loss([{"input": sample.tensors[0]}], sample.tensors[1]))
        results.append(loss.compute_loss_from_embeddings([sample.tensors[0]], sample.tensors[1]))
        assert isinstance(loss.sentence_embedder, Model)
    for result in results:
        torch.testing.assert_close(result, results[0])
    assert getattr(ours, name)(Model()).get_config_dict() == getattr(losses, name)(Model()).get_config_dict()


@by_loss
@pytest.mark.parametrize("metric", METRICS)
def test_their_distance_functions(metric, name):
    (sample, *_) = batches()
    theirs = getattr(losses.BatchHardTripletLossDistanceFunction, metric)
    own = getattr(ours.BatchHardTripletLossDistanceFunction, metric)
    x, labels = sample.tensors
    got, expected = (
        getattr(ours, name)(Model(), distance_metric=d)([{"input": x}], labels) for d in (theirs, own)
    )
    assert torch.equal(got, expected)
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-6, atol=1e-8)


def test_squared_distances():
    x = torch.randn(7, 3, dtype=torch.float64)
    got, expected = (
        m.BatchHardTripletLossDistanceFunction.euclidean_distance(x, squared=True) for m in (ours, losses)
    )
    torch.testing.assert_close(got, expected)


@by_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    sample = list(batches())[2]
    x = (sample.tensors[0] * 100).to(dtype)
    loss = getattr(ours, name)(Model())([{"input": x}], sample.tensors[1])
    exact = getattr(losses, name)(Model())([{"input": x.double()}], sample.tensors[1])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)


@by_loss
def test_no_rows(name):
    """Theirs fails, on the maximum of nothing or on its index."""
    x, labels = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss = getattr(ours, name)(Model())([{"input": x}], labels)
    loss.backward()
    assert loss.item() == 0


@by_loss
def test_soft_margin_and_margin_at_a_gap_of_200(name):
    """Up to version 5 theirs took log(1 + exp(gap)), which is inf from 89 on in float32."""
    x = torch.tensor([[0.0], [200.0], [1.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    got, expected = (getattr(m, name)(Model())([{"input": x}], labels) for m in (ours, losses))
    torch.testing.assert_close(got, expected)
    assert torch.autograd.grad(got, x)[0].isfinite().all()
    if name == "BatchHardSoftMarginTripletLoss":  # gaps 200 - 1, 200 - 199 and 0 - 1
        one, minus_one = torch.nn.functional.softplus(torch.tensor([1.0, -1.0]))
        torch.testing.assert_close(got, (199 + one + minus_one) / 3)
        assert torch.log1p(torch.exp(torch.tensor(199.0))).isinf()


# ---- where theirs is wrong ---------------------------------------------------------------------------------


@by_loss
def test_wrong_upstream_distances_far_from_the_origin(name):
    """float32, 100 away from the origin: theirs takes |a|^2 + |b|^2 - 2ab, which cancels."""
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(60, 16, generator=g) / 30 + 100, balanced_labels(60, 4, g)
    options = {"margin": 0.1} if name in WITH_MARGIN else {}
    results = []
    for module, rows in ((ours, x), (losses, x), (losses, x.double())):
        leaf = rows.clone().requires_grad_()
        loss = getattr(module, name)(Model(), **options)([{"input": leaf}], labels)
        results.append((loss.double(), torch.autograd.grad(loss, leaf)[0].double()))
    (got, gradient), (wrong, wrong_gradient), (exact, exact_gradient) = results
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=0)
    assert (gradient - exact_gradient).norm() < 1e-4 * exact_gradient.norm()
    assert (wrong - exact).abs() > 1e-2 * exact
    assert (wrong_gradient - exact_gradient).norm() > 0.1 * exact_gradient.norm()


@by_loss
def test_wrong_upstream_gradient_of_a_cosine_at_a_zero_vector(name):
    """Theirs divides by 1e-12 there. Losses agree, and so do the gradients of all other rows."""
    (sample,) = (b for b in batches() if b.name == "zero_rows")
    zero = (sample.tensors[0] == 0).all(dim=1)
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 2, 2, 0])  # all have company: what a zero vector is to itself
    sample = Sample("", [sample.tensors[0], labels])
    options = {"margin": 0.9} if name in WITH_MARGIN else {}
    got, gradient = evaluate(ours, name, "cosine_distance", sample, torch.float64, **options)
    expected, wrong = evaluate(losses, name, "cosine_distance", sample, torch.float64, **options)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient[~zero], wrong[~zero])
    assert not gradient[zero].any()
    assert wrong[zero].abs().max() > 1e8


def test_a_zero_vector_alone_under_cosine():
    """The corner that is not followed: theirs has d_ap = 0 for lack of a positive, ours the 1 from itself."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    got, expected = (
        m.BatchHardTripletLoss(Model(), m.BatchHardTripletLossDistanceFunction.cosine_distance, 0.5)(
            [{"input": x}], labels
        )
        for m in (ours, losses)
    )
    assert got.item() == pytest.approx((0.5 + 0.5 + 0.5) / 3)
    assert expected.item() == pytest.approx((0 + 0.5 + 0.5) / 3)


@by_loss
def test_nan(name):
    x = torch.randn(8, 3)
    x[3, 1] = float("nan")
    for labels in (torch.arange(8) // 2, torch.zeros(8, dtype=torch.int64), torch.arange(8)):
        assert getattr(ours, name)(Model())([{"input": x}], labels).isnan()


# ---- errors ------------------------------------------------------------------------------------------------


def cosine_distance(embeddings):
    """By the name of one that is known, and not it."""
    return embeddings @ embeddings.T


@by_loss
def test_unsupported_arguments(name):
    loss = getattr(ours, name)
    squared = partial(losses.BatchHardTripletLossDistanceFunction.euclidean_distance, squared=True)
    for metric in (
        cosine_distance,
        squared,
        lambda x: x,
        losses.SiameseDistanceMetric.COSINE_DISTANCE,
        "cosine",
    ):
        with pytest.raises(ValueError, match=f"^{name}: distance_metric must be euclidean_distance or"):
            loss(Model(), distance_metric=metric)
    if name in WITH_MARGIN:
        with pytest.raises(ValueError, match=f"^{name}: margin must be a finite number >= 0"):
            loss(Model(), margin=-1)
    features = [{"input": torch.randn(4, 3)}]
    with pytest.raises(ValueError, match="labels must be"):
        loss(Model())(features, torch.arange(3))
    with pytest.raises(TypeError, match="labels must be"):
        loss(Model())(features, torch.arange(4.0))
