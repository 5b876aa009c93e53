"""total_variation_loss: by hand, against the reference, at its limits and under torch's transforms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck

from deepsim_ext import reference, total_variation_loss

by_option = pytest.mark.parametrize(
    ("distance", "reduction"), list(itertools.product(("l2", "l1"), ("mean", "sum")))
)
SHAPES = ((1, 1, 5), (2, 3, 7), (2, 3, 4, 5), (1, 2, 1, 6), (2, 1, 3, 4, 2), (1, 2, 2, 1, 3))


def test_by_hand() -> None:
    # Down: 3, -1. Right: 2, -2. Their squares: 10 and 8.
    image = torch.tensor([[[[1.0, 3], [4, 2]]]], requires_grad=True)
    assert total_variation_loss(image).item() == 10 / 2 + 8 / 2
    assert total_variation_loss(image, distance="l1").item() == 4 / 2 + 4 / 2
    assert total_variation_loss(image, distance="l1", reduction="sum").item() == 8
    loss = total_variation_loss(image, reduction="sum")
    assert loss.item() == 18
    (grad,) = torch.autograd.grad(loss, image)
    # Twice the differences to both neighbours.
    assert grad.tolist() == [[[[2 * (-3 - 2), 2 * (2 + 1)], [2 * (3 + 2), 2 * (-1 - 2)]]]]


@by_option
def test_means_are_over_all_samples_and_channels(distance: str, reduction: str) -> None:
    image = torch.randn(1, 1, 4, 5)
    options = {"distance": distance, "reduction": reduction}
    one, many = (
        total_variation_loss(image, **options),
        total_variation_loss(image.expand(3, 2, 4, 5), **options),
    )
    torch.testing.assert_close(many, one if reduction == "mean" else 6 * one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@by_option
def test_equals_the_reference(distance: str, reduction: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        image = torch.randn(shape).to(dtype).requires_grad_()
        exact = image.detach().double().requires_grad_()
        options = {"distance": distance, "reduction": reduction}
        loss = total_variation_loss(image, **options)
        expected = reference.total_variation_loss(exact, **options)
        assert loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        grad, exact_grad = torch.autograd.grad(loss, image)[0], torch.autograd.grad(expected, exact)[0]
        assert grad.dtype == dtype
        tolerance = {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-6)
        assert (grad.double() - exact_grad).norm() <= tolerance * exact_grad.norm()


@by_option
@pytest.mark.parametrize("module", [total_variation_loss, reference.total_variation_loss])
def test_gradients(distance: str, reduction: str, module) -> None:
    for shape in SHAPES:
        image = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def loss(x: torch.Tensor) -> torch.Tensor:
            return module(x, distance=distance, reduction=reduction)

        assert gradcheck(loss, image) and gradgradcheck(loss, image)


@by_option
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 1, 1), (1, 2, 1, 1, 1)])
@pytest.mark.parametrize("module", [total_variation_loss, reference.total_variation_loss])
def test_one_position_has_no_variation(shape, distance: str, reduction: str, module) -> None:
    image = torch.randn(shape, requires_grad=True)
    loss = module(image, distance=distance, reduction=reduction)
    loss.backward()
    assert loss.item() == 0 and torch.equal(image.grad, torch.zeros(shape))


@by_option
def test_a_flat_image_has_no_gradient(distance: str, reduction: str) -> None:
    image = torch.full((1, 2, 3, 4), 0.3, requires_grad=True)
    loss = total_variation_loss(image, distance=distance, reduction=reduction)
    loss.backward()
    assert loss.item() == 0 and not image.grad.any()


def test_halves_do_not_overflow_and_nan_is_not_hidden() -> None:
    image = torch.tensor([[[300.0, -300.0, 300.0]]], dtype=torch.float16)  # 600^2 is beyond float16
    assert total_variation_loss(image, reduction="sum").item() == 2 * 600**2
    image[0, 0, 2] = math.nan
    for distance in ("l2", "l1"):
        assert total_variation_loss(image, distance=distance).isnan()


def test_transforms() -> None:
    x = torch.randn(3, 2, 4, 5, 6)
    expected = total_variation_loss(x)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(total_variation_loss, fullgraph=True, dynamic=True, backend=graphs)
    for part in (x, x[:, :, :3], x[..., :4]):
        leaf = part.clone().requires_grad_()
        torch.testing.assert_close(compiled(leaf), total_variation_loss(part))
        grads = [torch.autograd.grad(f(leaf), leaf) for f in (compiled, reference.total_variation_loss)]
        torch.testing.assert_close(*grads)
    assert graphs.frame_count == 1
    torch.testing.assert_close(torch.vmap(total_variation_loss)(x[:, None]).mean(), expected)
    last = x.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(total_variation_loss(last), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(total_variation_loss(x), expected)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total_variation_loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total_variation_loss)(x), grad)
