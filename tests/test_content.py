"""content_loss: against the reference, layers and weights, and under torch's transforms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from deepsim_ext import reference
from deepsim_ext.functional import content_loss

REDUCTIONS = ("mean", "sum", "gatys")


def layers(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 4, 5), (1, 7), ())
    features, target = (
        [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes] for _ in "ft"
    )
    return features, target


def test_by_hand() -> None:
    features, target = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 0], [0, 4]])  # squares 4 and 9
    for reduction, expected in (("mean", 13 / 4), ("sum", 13.0), ("gatys", 6.5)):
        assert content_loss(features, target, reduction=reduction).item() == expected
    assert content_loss(features, target).item() == 13 / 4
    pair = content_loss([features, target], (target, target + 1), weights=[10, -0.5], reduction="sum")
    assert pair.item() == 130 - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_the_reference(reduction: str, dtype: torch.dtype) -> None:
    features, target = layers(dtype)
    results = []
    for function in (content_loss, reference.content_loss):
        loss = function(features, target, weights=[1, 0.5, 3], reduction=reduction)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        results.append([loss, *torch.autograd.grad(loss, features + target)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert all(grad.dtype == dtype for grad in results[0][1:])


def test_halves_do_not_overflow() -> None:
    features = torch.full((4,), 300.0, dtype=torch.float16)  # 600^2 is beyond the range of float16
    assert content_loss(features, -features).item() == 600**2


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients(reduction: str) -> None:
    features, target = layers(torch.float64)

    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return content_loss(list(inputs[:3]), list(inputs[3:]), weights=[1, 2, 3], reduction=reduction)

    assert gradcheck(loss, (*features, *target)) and gradgradcheck(loss, (*features, *target))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_features_are_not_hidden(value: float) -> None:
    features = torch.ones(2, 3)
    features[1, 1] = value
    assert not content_loss(features, torch.ones(2, 3)).isfinite()
    assert content_loss(features, features).isnan()


def test_transforms() -> None:
    x, t = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    expected = content_loss(x, t)
    compiled = torch.compile(content_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t), expected)
    torch.testing.assert_close(compiled(x[:, :, :3], t[:, :, :3]), content_loss(x[:, :, :3], t[:, :, :3]))
    torch.testing.assert_close(torch.vmap(content_loss)(x, t).mean(), expected)
    torch.testing.assert_close(content_loss(x.to(memory_format=torch.channels_last), t), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(content_loss(x, t), expected)
    torch.testing.assert_close(torch.func.grad(content_loss)(x, t), (x - t) * 2 / x.numel())
