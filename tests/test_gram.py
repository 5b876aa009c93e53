"""Gram matrix and style loss: the compiled ops against the reference, and every contract."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import gram_matrix, reference, style_loss

from .samples import DTYPES, style_samples

ops = torch.ops.deepsim_ext

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# What is made of the difference of two Gram matrices.
DIFFERENCES = [(r, d) for r in ("mean", "sum", "gatys") for d in ("l2", "l1")] + [("sum", "frobenius")]
by_difference = pytest.mark.parametrize(("reduction", "distance"), DIFFERENCES)
NORMALIZATIONS = ("none", "hw", "chw", "bchw", 37.5)

# Against float64 on the same values. A half gradient is rounded to its dtype, that of the target is not.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def compute_dtype(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def assert_close(got, exact, rtol):
    assert got.shape == exact.shape
    assert (got.double() - exact).norm() <= rtol * exact.norm()


@by_dtype
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gram_matrix_and_its_gradient_match_the_reference(dtype, normalize):
    for sample in style_samples(dtype):
        features = sample.fresh(requires_grad=True)[0]
        exact = features.detach().double().requires_grad_()
        got, expected = (
            gram_matrix(features, normalize=normalize),
            reference.gram_matrix(exact, normalize=normalize),
        )
        assert got.dtype == compute_dtype(dtype)
        assert torch.equal(got, got.mT)
        assert_close(got, expected, TOLERANCE[compute_dtype(dtype)])
        incoming = torch.randn_like(got)  # not symmetric
        got.backward(incoming)
        expected.backward(incoming.double())
        assert features.grad.dtype == dtype
        assert_close(features.grad, exact.grad, TOLERANCE[dtype])


@by_dtype
@by_difference
def test_style_loss_and_its_gradients_match_the_reference(dtype, distance, reduction):
    for i, sample in enumerate(style_samples(dtype)):
        ours = sample.fresh(requires_grad=True)
        exact = [t.detach().double().requires_grad_() for t in ours]
        options = {"normalize": NORMALIZATIONS[i % 5], "reduction": reduction, "distance": distance}
        got, expected = style_loss(*ours, **options), reference.style_loss(*exact, **options)
        assert got.dtype == compute_dtype(dtype)
        assert_close(got, expected, 1e-5 if got.dtype == torch.float32 else 1e-12)
        grads = torch.autograd.grad(expected, exact)
        scale = (
            1 / grads[0].abs().max().item()
        )  # as a gradient scaler does: float16 gradients stay normal numbers
        for x, g, e in zip(ours, torch.autograd.grad(got * scale, ours), grads, strict=True):
            assert g.dtype == x.dtype
            assert_close(g, e * scale, max(TOLERANCE[x.dtype], 1e-5 if got.dtype == torch.float32 else 0))


def test_frobenius_of_no_difference():
    for features in (torch.randn(2, 5, 4, 4), torch.zeros(1, 3, 2, 2)):
        features.requires_grad_()
        target = gram_matrix(features.detach())
        loss = style_loss(features, target, reduction="sum", distance="frobenius")
        loss.backward()
        assert loss.item() == 0 and not features.grad.any()
        bad = target.clone()
        bad[0, 0, 0] = torch.nan
        assert style_loss(features, bad, reduction="sum", distance="frobenius").isnan()


def test_layers_add_up_by_their_weights():
    samples = [s for s in style_samples() if s.name in ("picture-each", "ragged-shared", "volume-one")]
    features, targets = [s.tensors[0] for s in samples], [s.tensors[1] for s in samples]
    weights = [0.5, 2.0, -1.0]
    together = style_loss(features, targets, weights=weights)
    apart = sum(w * style_loss(f, t) for f, t, w in zip(features, targets, weights, strict=True))
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(together, reference.style_loss(features, targets, weights=weights))
    torch.testing.assert_close(
        style_loss(tuple(features), tuple(targets)), reference.style_loss(features, targets)
    )


@by_difference
def test_gradcheck_on_the_compiled_op(distance, reduction):
    for sample in style_samples(small=True):

        def loss(features, target):
            return style_loss(features, target, normalize="hw", reduction=reduction, distance=distance)

        assert torch.autograd.gradcheck(loss, sample.fresh(requires_grad=True))
        assert torch.autograd.gradgradcheck(loss, sample.fresh(requires_grad=True))
    for sample in style_samples(small=True):
        features = sample.fresh(requires_grad=True)[0]
        assert torch.autograd.gradcheck(gram_matrix, features)
        assert torch.autograd.gradgradcheck(gram_matrix, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(dtype):
    for i, sample in enumerate(style_samples(dtype, small=True)):
        features, target = sample.fresh(requires_grad=True)
        features = features.flatten(2).detach().requires_grad_()
        target = target.detach().reshape(-1, *target.shape[-2:]).requires_grad_()
        opcheck(
            ops.style_loss.default,
            (features, target, "chw", 1.0, ("mean", "gatys")[i % 2], ("l2", "l1")[i % 2]),
        )
        opcheck(ops.gram_matrix.default, (features, "none", 3.0))
        grad = torch.randn(features.shape[0], *target.shape[-2:], dtype=target.dtype, requires_grad=True)
        opcheck(ops.gram_matrix_backward.default, (grad, features, "hw", 1.0))


def test_float16_neither_overflows_nor_loses_small_layers():
    """Activations as large as VGG's: F F^T exceeds 65504 everywhere, the mean gradient is far below 6e-8."""
    features = (torch.rand(1, 64, 48, 48) * 400).to(torch.float16).requires_grad_()
    target = torch.zeros(64, 64)
    exact = features.detach().double().requires_grad_()
    for options in ({"normalize": "none", "reduction": "gatys"}, {"normalize": "chw"}, {"normalize": "hw"}):
        got, expected = (
            style_loss(features, target, **options),
            reference.style_loss(exact, target.double(), **options),
        )
        assert_close(got, expected, 1e-6)
        scale = 1e-2 / torch.autograd.grad(expected, exact, retain_graph=True)[0].abs().max()
        (g,) = torch.autograd.grad(got, features, scale.float())
        (e,) = torch.autograd.grad(expected, exact, scale)
        assert g.isfinite().all()
        assert_close(g, e, 1e-3)
    naive = torch.bmm(features.detach().flatten(2), features.detach().flatten(2).mT)
    assert naive.isinf().all()  # what torch's own float16 product gives


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_every_way_to_allow_tf32_is_understood(precision):
    """The settings of torch.backends.cuda, which CUDA kernels read."""
    features = torch.randn(1, 40, 9, requires_grad=True)
    exact = reference.gram_matrix(features.detach().double())
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        got = gram_matrix(features)
        got.sum().backward()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert_close(got.detach(), exact, 2e-3 if precision == "tf32" else 2e-6)


@by_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nan_or_inf_makes_the_loss_nan_or_inf(dtype, bad):
    features = torch.randn(1, 40, 20, 20).to(dtype)
    features[0, 3, 4, 5] = bad
    loss = style_loss(features, torch.zeros(40, 40, dtype=compute_dtype(dtype)))
    assert not loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_small_slope_is_zero_at_the_target(dtype):
    features = torch.randn(2, 5, 6, 6, dtype=dtype, requires_grad=True)
    for distance in ("l2", "l1"):
        style_loss(features, gram_matrix(features).detach(), distance=distance).backward()
        assert torch.equal(features.grad, torch.zeros_like(features))
        features.grad = None


def test_targets_that_need_no_gradient_get_none():
    features, target = torch.randn(1, 3, 4, 4), torch.randn(3, 3, requires_grad=True)
    style_loss(features, target).backward()
    assert target.grad is not None
    assert features.grad is None
