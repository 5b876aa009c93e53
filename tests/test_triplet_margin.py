"""triplet_margin_loss: by hand, against the reference, torch and pytorch-metric-learning, at its limits."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from torch.autograd import gradcheck, gradgradcheck

from deepsim_ext import reference
from deepsim_ext.triplet_margin import triplet_margin_loss

DISTANCES = ("euclidean", "sqeuclidean", "cosine")
REDUCTIONS = ("mean", "mean_nonzero", "sum", "none")
by_distance = pytest.mark.parametrize("distance", DISTANCES)
by_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
by_swap = pytest.mark.parametrize("swap", [False, True])
by_soft = pytest.mark.parametrize("soft", [False, True])
by_function = pytest.mark.parametrize(
    "function", [triplet_margin_loss, reference.triplet_margin_loss], ids=["deepsim_ext", "reference"]
)


def triplets(t: int = 9, d: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(t)
    return tuple(torch.randn(t, d, generator=g).to(dtype).requires_grad_() for _ in range(3))


# d_ap: 5, 1, 0; d_an: 4, 3, 0; d_pn: 3, 2, 0
ANCHOR = torch.tensor([[0.0, 0], [0, 0], [1, 1]])
POSITIVE = torch.tensor([[3.0, 4], [1, 0], [1, 1]])
NEGATIVE = torch.tensor([[0.0, 4], [3, 0], [1, 1]])


@by_function
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [25 - 16 + 0.2, 0, 0.2]),  # FaceNet's form is the default
        ({"distance": "euclidean", "margin": 1}, [2, 0, 1]),
        ({"distance": "euclidean", "margin": 3}, [4, 1, 3]),
        ({"distance": "euclidean", "margin": 2}, [3, 0, 2]),  # 1 - 3 + 2 is not active
        ({"distance": "euclidean", "margin": 3, "swap": True}, [5, 2, 3]),
        ({"margin": 0, "swap": True}, [25 - 9, 0, 0]),
        ({"distance": "euclidean", "soft": True}, [math.log1p(math.exp(z)) for z in (1, -2, 0)]),
        ({"soft": True, "margin": 7, "swap": True}, [math.log1p(math.exp(z)) for z in (16, -3, 0)]),
    ],
)
def test_by_hand(function, options: dict, expected: list[float]) -> None:
    active = sum(v > 0 for v in expected)
    for reduction, value in (
        ("none", expected),
        ("sum", sum(expected)),
        ("mean", sum(expected) / 3),
        ("mean_nonzero", sum(expected) / max(active, 1)),
    ):
        loss = function(ANCHOR, POSITIVE, NEGATIVE, reduction=reduction, **options)
        torch.testing.assert_close(loss, torch.tensor(value, dtype=torch.float32))
    mean = function(ANCHOR, POSITIVE, NEGATIVE, **options)
    assert torch.equal(mean, function(ANCHOR, POSITIVE, NEGATIVE, reduction="mean", **options))


@by_function
def test_swap_takes_the_smaller_distance(function) -> None:
    a, p, n = (torch.tensor([[v], [w]]) for v, w in ((0.0, 0.0), (1.0, 1.0), (3.0, -3.0)))  # d_pn: 2, 4
    options = {"distance": "euclidean", "margin": 10, "swap": True, "reduction": "none"}
    assert function(a, p, n, **options).tolist() == [1 - 2 + 10, 1 - 3 + 10]


@by_function
def test_cosine_by_hand(function) -> None:
    h = 0.5**0.5
    a = torch.tensor([[2.0, 0], [0, 0], [1, 0]])
    p = torch.tensor([[1.0, 1], [1, 0], [-3, 0]])
    n = torch.tensor([[0.0, 5], [1, 1], [0, 0]])
    # d_ap: 1-h, 1, 2; d_an: 1, 1, 1; d_pn: 1-h, 1-h, 1
    for swap, expected in ((False, [0.5 - h, 0.5, 1.5]), (True, [0.5, 0.5 + h, 1.5])):
        loss = function(a, p, n, distance="cosine", margin=0.5, swap=swap, reduction="none")
        torch.testing.assert_close(loss, torch.tensor(expected).relu())


@by_distance
@by_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_reference(dtype: torch.dtype, reduction: str, distance: str) -> None:
    inputs = triplets(dtype=dtype)
    for options in ({}, {"swap": True, "margin": 1.0}, {"soft": True}, {"soft": True, "swap": True}):
        ours, theirs = (
            f(*inputs, distance=distance, reduction=reduction, **options)
            for f in (triplet_margin_loss, reference.triplet_margin_loss)
        )
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ours.shape == ((9,) if reduction == "none" else ())
        torch.testing.assert_close(ours, theirs)
        gradients = (torch.autograd.grad(loss.sum(), inputs) for loss in (ours, theirs))
        for a, b in zip(*gradients, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b)


@by_swap
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(reduction: str, swap: bool) -> None:
    inputs = triplets(50, dtype=torch.float64)
    options = {"margin": 0.7, "swap": swap, "reduction": reduction}
    ours = triplet_margin_loss(*inputs, distance="euclidean", **options)
    # torch adds 1e-6 to every difference unless told otherwise.
    exact = torch.nn.functional.triplet_margin_loss(*inputs, eps=0.0, **options)
    torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)
    gradients = (torch.autograd.grad(loss.sum(), inputs) for loss in (ours, exact))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    default = torch.nn.functional.triplet_margin_loss(*inputs, **options)
    torch.testing.assert_close(ours, default, rtol=1e-5, atol=1e-5)


@by_swap
@by_soft
@pytest.mark.parametrize(("distance", "power"), [("euclidean", 1), ("sqeuclidean", 2)])
def test_equals_pytorch_metric_learning(distance: str, power: int, soft: bool, swap: bool) -> None:
    a, p, n = triplets(12, dtype=torch.float64)
    indices = tuple(torch.arange(12) + 12 * i for i in range(3))
    margin = 0.0 if soft else 0.7  # their soft loss adds the margin
    theirs = TripletMarginLoss(
        margin=margin,
        swap=swap,
        smooth_loss=soft,
        distance=LpDistance(normalize_embeddings=False, power=power),
    )(torch.cat([a, p, n]), indices_tuple=indices)
    ours = triplet_margin_loss(
        a, p, n, margin=margin, swap=swap, soft=soft, distance=distance, reduction="mean_nonzero"
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(loss, (a, p, n)) for loss in (ours, theirs))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


@by_distance
@by_reduction
@by_swap
@by_soft
def test_gradients(soft: bool, swap: bool, reduction: str, distance: str) -> None:
    inputs = triplets(6, 3, torch.float64)

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return triplet_margin_loss(
            *inputs, margin=1.0, swap=swap, soft=soft, distance=distance, reduction=reduction
        )

    assert loss(*inputs).sum() > 0
    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)


@by_function
@by_distance
@by_swap
@by_soft
def test_gradients_at_zero_distance_and_of_zero_vectors(function, soft, swap, distance) -> None:
    for value in (1.0, 0.0):
        inputs = tuple(torch.full((3, 2), value, dtype=torch.float64).requires_grad_() for _ in range(3))
        loss = function(*inputs, swap=swap, soft=soft, distance=distance)
        assert loss.item() == pytest.approx(math.log(2) if soft else 0.2, rel=1e-14)
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
        second = torch.autograd.grad(sum(g.sum() + g.square().sum() for g in grads), inputs)
        assert all(g.isfinite().all() for g in second)


def test_close_vectors_do_not_cancel() -> None:
    a = torch.tensor([[100.0, 0]])
    p, n = torch.tensor([[100.0, 0.01]]), torch.tensor([[100.0, 0.02]])  # 1 - cos is 5e-9 and 2e-8
    for distance, expected in (("cosine", 1.5e-8), ("sqeuclidean", 3e-4), ("euclidean", 1e-2)):
        loss = triplet_margin_loss(a, n, p, margin=0, distance=distance)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [1e-25, 1e20])
def test_cosine_of_rows_whose_squares_leave_float32(length: float) -> None:
    rows = [(torch.randn(5, 6) * length).requires_grad_() for _ in range(3)]
    exact = [r.detach().double().requires_grad_() for r in rows]
    options = {"distance": "cosine", "margin": 1.0}
    loss, expected = triplet_margin_loss(*rows, **options), triplet_margin_loss(*exact, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for got, right in zip(torch.autograd.grad(loss, rows), torch.autograd.grad(expected, exact), strict=True):
        assert (got.double() - right).norm() <= 1e-5 * right.norm()


def test_halves_do_not_overflow() -> None:
    x = torch.full((1, 4), 300.0, dtype=torch.float16)  # d^2 = 4 * 600^2 is beyond the range of float16
    assert triplet_margin_loss(x, -x, x, margin=0).item() == 4 * 600**2


def test_softplus_neither_overflows_nor_vanishes() -> None:
    a, p, n = (torch.tensor([[v], [w]], dtype=torch.float64) for v, w in ((0, 0), (1000, 30), (0, 0)))
    options = {"soft": True, "distance": "euclidean", "reduction": "none"}
    assert triplet_margin_loss(a, p, n, **options).tolist() == [1000, 30 + math.log1p(math.exp(-30))]
    easy = triplet_margin_loss(a, n, p, **options)
    assert easy.tolist() == [0, pytest.approx(math.exp(-30), rel=1e-12)]


@by_function
@by_distance
@by_reduction
def test_no_triplets(function, reduction: str, distance: str) -> None:
    inputs = tuple(torch.zeros(0, 3, requires_grad=True) for _ in range(3))
    loss = function(*inputs, distance=distance, reduction=reduction)
    assert torch.equal(loss, torch.zeros(0 if reduction == "none" else ()))
    assert all(g.shape == (0, 3) for g in torch.autograd.grad(loss.sum(), inputs))


@by_function
def test_mean_of_no_active_triplet_is_zero_with_zero_gradient(function) -> None:
    a = torch.zeros(2, 3, requires_grad=True)
    loss = function(a, a + 1, a + 5, reduction="mean_nonzero")
    (grad,) = torch.autograd.grad(loss, a)
    assert loss.item() == 0 and torch.equal(grad, torch.zeros(2, 3))


@by_function
@by_distance
@by_soft
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", range(3))
def test_non_finite_triplets_are_nan_and_stay_apart(function, which, value, soft, distance) -> None:
    inputs = [
        torch.zeros(4, 3),
        torch.randn(4, 3),
        torch.randn(4, 3),
    ]  # 1 from zero vectors by cosine, always
    inputs[which][2, 1] = value
    for swap in (False, True):
        options = {"distance": distance, "soft": soft, "swap": swap}
        loss = function(*inputs, reduction="none", **options)
        assert loss.isnan().tolist() == [i == 2 for i in range(4)]
        for reduction in ("mean", "mean_nonzero", "sum"):
            assert function(*inputs, reduction=reduction, **options).isnan()


@by_function
def test_finite_triplets_are_never_nan(function) -> None:
    """However large: their sums and squares are not finite, but they are."""
    a = torch.tensor([[3e38, 3e38], [0.0, 0.0], [3e38, -3e38]])
    p, n = a.clone(), torch.tensor([[0.0, 1.0], [3e38, 3e38], [3e38, -3e38]])
    assert function(a, p, n, reduction="none").tolist() == torch.tensor([0.0, 0.0, 0.2]).tolist()
    assert function(a, p, n, distance="cosine", reduction="none").isfinite().all()


def test_transforms() -> None:
    inputs = tuple(t.detach() for t in triplets(12))
    expected = triplet_margin_loss(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(triplet_margin_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    fewer = [t[:5] for t in inputs]
    torch.testing.assert_close(compiled(*fewer), triplet_margin_loss(*fewer))
    split = [t.reshape(3, 4, 4) for t in inputs]
    torch.testing.assert_close(torch.vmap(triplet_margin_loss)(*split).mean(), expected)
    strided = inputs[0].T.contiguous().T
    torch.testing.assert_close(triplet_margin_loss(strided, *inputs[1:]), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(triplet_margin_loss(*inputs), expected)
    gradient = torch.func.grad(triplet_margin_loss)(*inputs)
    leaf = inputs[0].clone().requires_grad_()
    (exact,) = torch.autograd.grad(triplet_margin_loss(leaf, *inputs[1:]), leaf)
    torch.testing.assert_close(gradient, exact)
