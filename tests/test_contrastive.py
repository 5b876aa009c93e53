"""contrastive_loss: against the reference, at its limits, and under torch's transforms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from deepsim_ext import reference
from deepsim_ext.functional import contrastive_loss

REDUCTIONS = ("mean", "sum", "none")


def pairs(n: int = 9, d: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    x1, x2 = (torch.randn(n, d, generator=g).to(dtype).requires_grad_() for _ in range(2))
    return x1, x2, torch.arange(n) % 2


def test_by_hand() -> None:
    # d: 5, 5, 0, 0; with margin 6 the dissimilar ones cost 1 and 36
    x1, x2 = (
        torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]]),
        torch.tensor([[3.0, 4], [3, 4], [1, 1], [1, 1]]),
    )
    y = torch.tensor([1, 0, 1, 0])
    for reduction, expected in (("none", [25.0, 1.0, 0.0, 36.0]), ("sum", 62.0), ("mean", 15.5)):
        assert contrastive_loss(x1, x2, y, margin=6, reduction=reduction).tolist() == expected
    assert contrastive_loss(x1, x2, y, reduction="none").tolist() == [25, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_reference(reduction: str, dtype: torch.dtype) -> None:
    x1, x2, y = pairs(dtype=dtype)
    ours = contrastive_loss(x1, x2, y, margin=3, reduction=reduction)
    theirs = reference.contrastive_loss(x1, x2, y, margin=3, reduction=reduction)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(t.sum(), (x1, x2)) for t in (ours, theirs)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b)


def test_halves_do_not_overflow() -> None:
    x1 = torch.full((1, 4), 300.0, dtype=torch.float16)  # d^2 = 4 * 600^2 is beyond the range of float16
    assert contrastive_loss(x1, -x1, torch.ones(1)).item() == 4 * 600**2


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64]
)
def test_y_of_any_real_dtype(dtype: torch.dtype) -> None:
    x1, x2, y = pairs()
    loss = contrastive_loss(x1, x2, y.to(dtype))
    assert loss.dtype == torch.float32 and torch.equal(loss, contrastive_loss(x1, x2, y))


@pytest.mark.parametrize("function", [contrastive_loss, reference.contrastive_loss])
@pytest.mark.parametrize("wrong", [-1, 2, 1.5, math.nan, math.inf])
def test_labels_that_are_neither_are_no_silent_number(wrong: float, function) -> None:
    x1, x2, _ = pairs(3)
    loss = function(x1, x2, torch.tensor([1, wrong, 0.5]), margin=9, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(loss.sum(), x1)
    assert gradient.isfinite()[[0, 2]].all()
    if function is contrastive_loss:
        assert gradient[1].isnan().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(reduction: str) -> None:
    x1, x2, y = pairs(dtype=torch.float64)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(a, b, y, margin=4, reduction=reduction)

    assert gradcheck(loss, (x1, x2)) and gradgradcheck(loss, (x1, x2))


def test_gradients_at_zero_distance() -> None:
    x1, _, y = pairs(dtype=torch.float64)
    x2 = x1.detach().clone().requires_grad_()
    grads = torch.autograd.grad(contrastive_loss(x1, x2, y), (x1, x2), create_graph=True)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    second = torch.autograd.grad(sum(g.sum() + g.square().sum() for g in grads), (x1, x2))
    assert all(g.isfinite().all() for g in second)


def test_empty() -> None:
    x = torch.zeros(0, 3, requires_grad=True)
    for reduction in REDUCTIONS:
        loss = contrastive_loss(x, x, torch.zeros(0), reduction=reduction)
        assert torch.equal(loss, torch.zeros(0 if reduction == "none" else ()))
        assert torch.autograd.grad(loss.sum(), x)[0].shape == (0, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_pairs_are_nan_and_stay_apart(value: float) -> None:
    x1, x2, y = (t.detach() for t in pairs())
    for row in (2, 3):  # a dissimilar pair and a similar one
        for bad1, bad2 in ((x1.clone(), x2), (x1, x2.clone())):
            (bad1 if bad2 is x2 else bad2)[row, 1] = value
            loss = contrastive_loss(bad1, bad2, y, reduction="none")
            assert loss.isnan().tolist() == [i == row for i in range(9)]
            assert (
                contrastive_loss(bad1, bad2, y).isnan() and reference.contrastive_loss(bad1, bad2, y).isnan()
            )


def test_transforms() -> None:
    x1, x2, y = (t.detach() for t in pairs(12))
    expected = contrastive_loss(x1, x2, y)
    compiled = torch.compile(contrastive_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x1, x2, y), expected)
    torch.testing.assert_close(compiled(x1[:5], x2[:5], y[:5]), contrastive_loss(x1[:5], x2[:5], y[:5]))
    split = [t.reshape(3, 4, *t.shape[1:]) for t in (x1, x2, y)]
    torch.testing.assert_close(torch.vmap(contrastive_loss)(*split).mean(), expected)
    strided = x1.T.contiguous().T
    torch.testing.assert_close(contrastive_loss(strided, x2, y), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(contrastive_loss(x1, x2, y), expected)
    gradient = torch.func.grad(contrastive_loss)(x1, x2, y)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(contrastive_loss(x1.requires_grad_(), x2, y), x1)[0]
    )
