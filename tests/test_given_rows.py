"""The ops of given triplets and pairs: what triplet_margin_loss and contrastive_loss have in common."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck

from deepsim_ext import contrastive_loss, reference, triplet_margin_loss

from .samples import DISTANCES, DTYPES

ops = torch.ops.deepsim_ext
Loss = Callable[..., Tensor]
OPTIONS = {
    **{f"triplets-{distance}": {"distance": distance} for distance in DISTANCES},
    "triplets-swap": {"swap": True, "soft": True, "distance": "euclidean"},
    "pairs": {"margin": 15.0},
}
by_loss = pytest.mark.parametrize("name", OPTIONS)


def loss_of(name: str, module=None) -> tuple[Loss, int]:
    """The loss as a function of sets of rows and a reduction, and how many sets it takes."""
    if name == "pairs":
        function = contrastive_loss if module is None else module.contrastive_loss

        def pairs(x1: Tensor, x2: Tensor, reduction: str = "mean") -> Tensor:
            y = torch.arange(len(x1)) % 3 / 2
            return function(x1, x2, y, reduction=reduction, **OPTIONS[name])

        return pairs, 2
    function = triplet_margin_loss if module is None else module.triplet_margin_loss

    def triplets(*rows: Tensor, reduction: str = "mean") -> Tensor:
        return function(*rows, reduction=reduction, **OPTIONS[name])

    return triplets, 3


def draw(sets: int, t: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(t, d).to(dtype).requires_grad_() for _ in range(sets)]


@by_loss
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "d"), [(1, 1), (700, 7), (300, 129), (65, 1024)])
def test_values_and_gradients_are_those_of_float64(t, d, dtype, name):
    loss, sets = loss_of(name)
    exact_loss, _ = loss_of(name, reference)
    rows = draw(sets, t, d, dtype)
    exact = [r.detach().double().requires_grad_() for r in rows]
    for reduction in ("sum", "none"):  # a mean's gradients would be too small for float16
        got, expected = loss(*rows, reduction=reduction), exact_loss(*exact, reduction=reduction)
        weight = torch.rand_like(expected)
        rounding = 1e-12 if dtype is torch.float64 else 1e-5
        torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=rounding / 10)
        gradients = torch.autograd.grad(got, rows, weight.to(got.dtype))
        for g, e in zip(gradients, torch.autograd.grad(expected, exact, weight), strict=True):
            assert g.dtype == dtype and g.shape == (t, d)
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
            assert (g.double() - e).norm() <= tolerance[dtype] * e.norm() + 1e-6


@by_loss
def test_rows_that_are_not_adjacent(name):
    loss, sets = loss_of(name)
    rows = draw(sets, 60, 24)
    views = [r.detach()[::2, ::3].requires_grad_() for r in rows]
    dense = [v.detach().contiguous().requires_grad_() for v in views]
    narrow = [torch.nn.functional.pad(d.detach(), (0, 5))[:, :-5].requires_grad_() for d in dense]
    expected = loss(*dense)
    for some in (views, narrow):
        assert torch.equal(loss(*some), expected)
        pairs = zip(
            torch.autograd.grad(loss(*some), some), torch.autograd.grad(loss(*dense), dense), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


@by_loss
def test_the_same_bits_for_any_number_of_threads(name):
    loss, sets = loss_of(name)
    rows = draw(sets, 4000, 33)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            value = loss(*rows)
            results.append([value.detach(), *torch.autograd.grad(value, rows)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@by_loss
def test_one_tensor_in_every_place(name):
    """Its gradients add up, and distances of 0 pull at nobody."""
    loss, sets = loss_of(name)
    (x,) = draw(1, 9, 5)
    (gradient,) = torch.autograd.grad(loss(*[x] * sets), x)
    rounding = 1e-15 if "cosine" in name else 0.0
    torch.testing.assert_close(gradient, torch.zeros_like(x), rtol=0, atol=rounding)
    y = draw(1, 9, 5)[0].detach()
    leaf = x.detach().clone().requires_grad_()
    places = [leaf] * (sets - 1) + [y]
    (gradient,) = torch.autograd.grad(loss(*places), leaf)
    apart = [p.detach().clone().requires_grad_() for p in places]
    parts = torch.autograd.grad(loss(*apart), apart[:-1])
    torch.testing.assert_close(gradient, sum(parts))


@by_loss
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_a_gradient_of_nan(name, value):
    """No silent zero, and none of it in the other rows."""
    loss, sets = loss_of(name)
    rows = draw(sets, 6, 4)
    for which in range(sets):
        bad = [r.detach().clone() for r in rows]
        bad[which][2, 1] = value
        bad = [b.requires_grad_() for b in bad]
        for gradient in torch.autograd.grad(loss(*bad, reduction="none").sum(), bad):
            assert gradient[2].isnan().all()
            assert gradient[[0, 1, 3, 4, 5]].isfinite().all()


def test_no_silent_zero_where_rows_are_the_same():
    """There a distance pulls at nobody, but what is not a number stays so."""
    anchor = torch.tensor([[1.0, 2.0, 3.0]])
    rows = [anchor, anchor.clone(), torch.tensor([[math.nan, 1.0, 2.0]])]
    rows = [r.requires_grad_() for r in rows]
    for distance in DISTANCES:
        for gradient in torch.autograd.grad(triplet_margin_loss(*rows, distance=distance), rows):
            assert gradient.isnan().all()
    gradients = torch.autograd.grad(contrastive_loss(*rows[:2], torch.tensor([2.0])), rows[:2])
    assert all(g.isnan().all() for g in gradients)


@by_loss
def test_squares_beyond_float64_are_no_silent_number(name):
    loss, sets = loss_of(name)
    rows = [torch.tensor([[1e200, 1.0], [1.0, 2.0]], dtype=torch.float64) * (i + 1) for i in range(sets)]
    assert loss(*rows, reduction="none").isnan().tolist() == [True, False]


def test_pairs_too_far_apart_for_the_squares_of_float32():
    """The dissimilar pair costs nothing, and that is what is said."""
    x1, x2 = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), 1e20, requires_grad=True)
    loss = contrastive_loss(x1, x2, torch.tensor([0.0, 1.0]), reduction="none")
    assert loss.tolist() == [0, math.inf]
    gradient = torch.autograd.grad(loss[0], x1)[0]
    assert torch.equal(gradient, torch.zeros(2, 3))


@by_loss
def test_forward_mode(name):
    """By plain torch, which it is compared with nowhere else."""
    loss, sets = loss_of(name)
    rows = [r.detach() for r in draw(sets, 7, 4, torch.float64)]
    tangents = [torch.randn_like(r) for r in rows]
    gradients = torch.autograd.grad(loss(*(leaves := [r.clone().requires_grad_() for r in rows])), leaves)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    _, got = torch.func.jvp(loss, tuple(rows), tuple(tangents))
    torch.testing.assert_close(got, expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(r, t) for r, t in zip(rows, tangents, strict=True)]
        torch.testing.assert_close(forward_ad.unpack_dual(loss(*duals)).tangent, expected)


@by_loss
def test_hessian(name):
    loss, sets = loss_of(name)
    first, *others = (r.detach() for r in draw(sets, 3, 2, torch.float64))
    hessian = torch.func.hessian(lambda x: loss(x, *others))(first)
    leaf = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, *others), leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient.flatten()]
    torch.testing.assert_close(hessian.reshape(6, 6), torch.stack(rows).reshape(6, 6))


@by_loss
def test_compiled_with_its_gradient(name):
    loss, sets = loss_of(name)
    rows = draw(sets, 12, 5)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value = compiled(*rows)
    torch.testing.assert_close(value, loss(*rows))
    pairs = zip(torch.autograd.grad(value, rows), torch.autograd.grad(loss(*rows), rows), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("t", [1, 5])
def test_opcheck(t, dtype):
    compute = torch.float32
    for reduction in ("mean", "none"):
        incoming = torch.rand((t,) if reduction == "none" else ())
        for swap in (False, True):
            rows, options = draw(3, t, 4, dtype), (0.5, swap, False, "euclidean", reduction)
            opcheck(ops.triplet_margin_loss.default, (*rows, *options))
            with torch.no_grad():
                _, *measured = ops.triplet_margin_loss(*rows, *options)
            opcheck(ops.triplet_margin_loss_backward.default, (incoming, *measured, *rows, *options))
        rows, y = draw(2, t, 4, dtype), (torch.arange(t) % 2).to(compute)
        opcheck(ops.contrastive_loss.default, (*rows, y, 1.0, reduction))
        with torch.no_grad():
            _, *measured = ops.contrastive_loss(*rows, y, 1.0, reduction)
        opcheck(ops.contrastive_loss_backward.default, (incoming, *measured, *rows, y, 1.0, reduction))


X, Y = torch.ones(4, 3), torch.ones(4)
TRIPLET_OPTIONS = (0.5, False, False, "euclidean", "mean")
MEASURED = torch.ones(2, 4), torch.ones(2, 4), torch.ones(())


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    [
        (
            "triplet_margin_loss",
            (X, X[:3], X, *TRIPLET_OPTIONS),
            ValueError,
            "positive must be of shape [4, 3]",
        ),
        ("triplet_margin_loss", (X, X, X.double(), *TRIPLET_OPTIONS), TypeError, "negative must be Float"),
        ("triplet_margin_loss", (X[0], X, X, *TRIPLET_OPTIONS), ValueError, "anchor must have 2 dimensions"),
        (
            "triplet_margin_loss",
            (X, X, X, 0.5, False, False, "l2", "mean"),
            ValueError,
            "distance must be one of",
        ),
        (
            "triplet_margin_loss",
            (X, X, X, *TRIPLET_OPTIONS[:-1], "max"),
            ValueError,
            "reduction must be one of",
        ),
        ("contrastive_loss", (X, X, Y[:3], 1.0, "mean"), ValueError, "y must be of shape [4]"),
        ("contrastive_loss", (X, X, Y.long(), 1.0, "mean"), TypeError, "y must be Float"),
        (
            "triplet_margin_loss_backward",
            (torch.ones(4), *MEASURED, X, X, X, *TRIPLET_OPTIONS),
            ValueError,
            "grad_loss must be of shape []",
        ),
        (
            "triplet_margin_loss_backward",
            (torch.ones(()), *MEASURED, X, X, X, 0.5, True, False, "euclidean", "mean"),
            ValueError,
            "distances must be of shape [3, 4]",
        ),
        (
            "contrastive_loss_backward",
            (torch.ones(4), *MEASURED, X, X, Y, 1.0, "none"),
            ValueError,
            "distances must be of shape [1, 4]",
        ),
    ],
)
def test_direct_calls_read_no_memory_that_is_not_there(op, arguments, error, message):
    with pytest.raises(error) as raised:
        getattr(ops, op)(*arguments)
    assert f"{op}: {message}" in str(raised.value)
