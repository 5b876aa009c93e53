"""Gram matrix: the compiled ops against the reference, and every contract."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import gram_matrix, reference

from .samples import DTYPES, Sample, style_samples

ops = torch.ops.deepsim_ext

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
NORMALIZATIONS = ("none", "hw", "chw", "bchw", 37.5)

# Against float64 on the same values. A half gradient is rounded to its dtype, that of the target is not.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def compute_dtype(dtype):
    return torch.float64 if dtype is torch.float64 else torch.float32


def assert_close(got, exact, rtol):
    assert got.shape == exact.shape
    assert (got.double() - exact).norm() <= rtol * exact.norm()


def samples(dtype: torch.dtype = torch.float64, small: bool = False) -> list[Sample]:
    """Once for all targets that the same features have."""
    return [s for s in style_samples(dtype, small) if not s.name.endswith(("-shared", "-one"))]


@by_dtype
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_gram_matrix_and_its_gradient_match_the_reference(dtype, normalize):
    for sample in samples(dtype):
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
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_channels_of_very_different_size(dtype, channels_last):
    """Each channel's own gradient is right to its rounding, and what is not finite stays in its channels."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = (30 * torch.randn(2, 70, 9, 16)).to(dtype, memory_format=layout).requires_grad_()
    size = 10 ** torch.linspace(-5, 0, 70, dtype=compute_dtype(dtype))
    incoming = torch.randn(2, 70, 70, dtype=compute_dtype(dtype)) * size * size[:, None]
    exact = features.detach().double().requires_grad_()
    gram_matrix(features, normalize="none").backward(incoming)
    reference.gram_matrix(exact, normalize="none").backward(incoming.double())
    error = (features.grad.double() - exact.grad).flatten(2).norm(dim=2)
    assert (error <= TOLERANCE[dtype] * exact.grad.flatten(2).norm(dim=2)).all()

    features.grad = None
    incoming[1, 3, 66] = torch.inf
    incoming[1, 20, 20] = torch.nan
    gram_matrix(features, normalize="none").backward(incoming)
    finite = features.grad.isfinite().flatten(2)
    broken = torch.zeros(2, 70, dtype=torch.bool)
    broken[1, [3, 20, 66]] = True
    assert not finite[broken].any() and finite[~broken].all()


def test_gradcheck_on_the_compiled_op():
    for sample in samples(small=True):
        features = sample.fresh(requires_grad=True)[0]
        assert torch.autograd.gradcheck(gram_matrix, features)
        assert torch.autograd.gradgradcheck(gram_matrix, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(dtype):
    for sample in samples(dtype, small=True):
        features = sample.tensors[0].flatten(2).detach().requires_grad_()
        opcheck(ops.gram_matrix.default, (features, "none", 3.0))
        b, c, _ = features.shape
        grad = torch.randn(b, c, c, dtype=compute_dtype(dtype), requires_grad=True)
        opcheck(ops.gram_matrix_backward.default, (grad, features, "hw", 1.0))


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
