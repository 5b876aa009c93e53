"""Masks of gram_matrix and style_loss: against the formula, the whole without a mask, and every contract."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from deepsim_ext import gram_matrix, nn, reference, style_loss

from .samples import DTYPES, feature_shapes

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
NORMALIZATIONS = ("none", "hw", "chw", "bchw", 37.5)
DIFFERENCES = [("mean", "l2"), ("gatys", "l2"), ("sum", "l1"), ("sum", "frobenius")]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def masks(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Masks of every shape and kind for features of `shape`, float64 or bool."""
    b, _, *spatial = shape
    draw = {"generator": generator, "dtype": torch.float64}
    return {
        "shared": torch.rand(spatial, **draw),
        "one": 1e3 * torch.rand(1, *spatial, **draw),
        "each": torch.rand(b, *spatial, **draw),
        "bool": torch.rand(b, *spatial, **draw) < 0.6,
    }


def exact_gram(features: Tensor, mask: Tensor, normalize: str | float) -> Tensor:
    """Sample by sample, as Gatys et al. write it, times N."""
    grams = []
    b, c, n = features.flatten(2).shape
    for f, m in zip(features.double().flatten(2), mask.double().expand(b, *features.shape[2:]), strict=True):
        t = m.flatten() / m.square().sum().sqrt() if m.any() else m.flatten()
        guided = f * t
        divisor = {"none": 1, "hw": n, "chw": c * n, "bchw": b * c * n}.get(normalize, normalize)
        grams.append(n * guided @ guided.T / divisor)
    return torch.stack(grams)


@by_dtype
def test_gram_matrix_and_its_gradients_match_the_formula(dtype):
    g = torch.Generator().manual_seed(3)
    tolerance = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 3e-6, torch.float64: 1e-13}
    for i, (_, shape) in enumerate(feature_shapes()):
        features = torch.randn(shape, generator=g).relu().to(dtype)
        for kind, mask in masks(shape, g).items():
            normalize = NORMALIZATIONS[i % 5]
            f = features.clone().requires_grad_()
            exact = features.to(torch.float64, copy=True).requires_grad_()
            m, exact_m = mask.clone(), mask.clone()  # its dtype need not be that of the features
            if kind != "bool":
                m.requires_grad_(), exact_m.requires_grad_()
            got, expected = gram_matrix(f, normalize=normalize, mask=m), exact_gram(exact, exact_m, normalize)
            assert got.dtype == compute_dtype(dtype)
            assert torch.equal(got, got.mT)
            assert (got - expected).norm() <= tolerance[got.dtype] * expected.norm()
            incoming = torch.randn(got.shape, generator=g, dtype=torch.float64).to(got.dtype)
            leaves = [(f, exact)] if kind == "bool" else [(f, exact), (m, exact_m)]
            got.backward(incoming)
            expected.backward(incoming.double())
            for ours, theirs in leaves:
                assert ours.grad.dtype == ours.dtype
                # A gradient by the mask is a small difference of large sums: it is 0 for one position.
                floor = tolerance[got.dtype] * (expected.norm() * incoming.norm() if ours is m else 0)
                error = (ours.grad - theirs.grad).norm()
                assert error <= 10 * (tolerance[f.dtype] * theirs.grad.norm() + floor)


@by_dtype
def test_style_loss_of_layers_with_and_without_a_mask_matches_the_reference(dtype):
    g = torch.Generator().manual_seed(4)
    shapes = [(2, 70, 13, 11), (2, 5, 6, 7), (2, 3, 9)]
    features = [torch.randn(s, generator=g).relu().to(dtype) for s in shapes]
    targets = [torch.rand(s[1], s[1], generator=g).to(compute_dtype(dtype)) / s[1] for s in shapes]
    mask = [torch.rand(2, 13, 11, generator=g), None, torch.rand(9, generator=g) < 0.5]
    for reduction, distance in DIFFERENCES:
        options = {"reduction": reduction, "distance": distance, "weights": [1.0, 0.5, 3.0], "mask": mask}
        ours = [f.clone().requires_grad_() for f in features]
        exact = [f.to(torch.float64, copy=True).requires_grad_() for f in features]
        got = style_loss(ours, targets, **options)
        expected = reference.style_loss(exact, [t.double() for t in targets], **options)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
        for x, e in zip(ours, torch.autograd.grad(expected, exact), strict=True):
            scale = 1 / e.abs().max().item()  # float16 gradients stay normal numbers
            (grad,) = torch.autograd.grad(got * scale, x, retain_graph=True)
            assert grad.dtype == dtype
            tolerance = {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5)
            assert (grad - e * scale).norm() <= tolerance * (e * scale).norm()


@pytest.mark.parametrize("module", [reference, nn], ids=["reference", "modules"])
def test_one_layer_takes_one_mask(module):
    f, target, mask = torch.randn(2, 3, 4, 5), torch.randn(3, 3), torch.rand(2, 4, 5)
    style = style_loss(f, target, mask=mask)
    gram = gram_matrix(f, mask=mask)
    others = (
        (module.style_loss(f, target, mask=mask), module.gram_matrix(f, mask=mask))
        if module is reference
        else (module.StyleLoss()(f, target, mask=mask), module.GramMatrix()(f, mask=mask))
    )
    torch.testing.assert_close((style, gram), others)
    torch.testing.assert_close(style_loss([f], [target], mask=[mask]), style)


@by_dtype
@pytest.mark.parametrize("value", [1.0, 0.25, 1e-30, 1e30])
def test_a_constant_mask_changes_nothing(dtype, value):
    f = torch.randn(2, 40, 9, 11).to(dtype)
    mask = torch.full((9, 11), value)
    torch.testing.assert_close(gram_matrix(f, mask=mask), gram_matrix(f), rtol=2e-6, atol=1e-7)
    if value == 1:
        bools = gram_matrix(f, mask=mask.bool())
        assert torch.equal(bools, gram_matrix(f, mask=mask))
        assert dtype not in (torch.float32, torch.float64) or torch.equal(bools, gram_matrix(f))


def test_samples_scale_by_themselves():
    f, mask = torch.randn(2, 3, 4, 5), torch.rand(4, 5)
    apart = torch.stack([mask, 1e-30 * mask])
    torch.testing.assert_close(gram_matrix(f, mask=apart), gram_matrix(f, mask=mask))


def test_regions_of_any_area_compare():
    """A region has the Gram matrix of a picture of its own, per position."""
    f = torch.randn(2, 5, 8, 8, dtype=torch.float64)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 1:3] = True
    for normalize in ("hw", "chw", "bchw"):
        inside = gram_matrix(f[:, :, 2:5, 1:3], normalize=normalize)
        torch.testing.assert_close(gram_matrix(f, normalize=normalize, mask=mask), inside)
    raw = gram_matrix(f, normalize="none", mask=mask)
    torch.testing.assert_close(raw, gram_matrix(f[:, :, 2:5, 1:3], normalize="none") * 64 / 6)


@by_dtype
@pytest.mark.parametrize("module", ["functional", "reference"])
def test_a_mask_of_zeros_gives_zeros(dtype, module):
    gram, style = (
        (gram_matrix, style_loss) if module == "functional" else (reference.gram_matrix, reference.style_loss)
    )
    f = torch.randn(2, 3, 4, 5).to(dtype).requires_grad_()
    mask = torch.ones(2, 4, 5)
    mask[1] = 0
    mask.requires_grad_()
    got = gram(f, mask=mask)
    assert not got[1].any() and got[0].any()
    loss = style(f, torch.ones(3, 3, dtype=got.dtype), mask=mask)
    loss.backward()
    assert loss.isfinite() and f.grad.isfinite().all() and mask.grad.isfinite().all()
    assert not f.grad[1].any() and not mask.grad[1].any() and f.grad[0].any()


def test_a_nan_in_the_mask_is_not_hidden():
    mask = torch.ones(4, 5)
    for bad in (math.nan, math.inf):
        mask[2, 2] = bad
        assert gram_matrix(torch.randn(1, 3, 4, 5), mask=mask).isnan().any()


@pytest.mark.parametrize(("reduction", "distance"), DIFFERENCES)
def test_gradcheck(reduction, distance):
    g = torch.Generator().manual_seed(5)
    for _, shape in feature_shapes(small=True):
        for kind, mask in masks(shape, g).items():
            f = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
            target = torch.randn(shape[1], shape[1], generator=g, dtype=torch.float64)
            if kind == "bool":
                inputs, call = (
                    (f,),
                    lambda f, m=mask, t=target: style_loss(
                        f, t, mask=m, reduction=reduction, distance=distance, normalize="hw"
                    ),
                )
            else:
                inputs = (f, (mask / mask.max() + 0.2).requires_grad_())
                call = lambda f, m, t=target: style_loss(  # noqa: E731
                    f, t, mask=m, reduction=reduction, distance=distance, normalize="hw"
                )
            assert torch.autograd.gradcheck(call, inputs)
            if kind != "one":
                assert torch.autograd.gradgradcheck(call, inputs)


def test_transforms():
    f, target, mask = torch.randn(4, 2, 3, 5, 6), torch.randn(3, 3), torch.rand(2, 5, 6)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(style_loss, fullgraph=True, dynamic=True, backend=graphs)
    for h in (5, 4, 3):
        leaf, m = f[0, :, :, :h].clone().requires_grad_(), mask[:, :h].clone()
        got, expected = compiled(leaf, target, mask=m), style_loss(leaf, target, mask=m)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(expected, leaf))
    assert graphs.frame_count == 1
    each = torch.stack([gram_matrix(x, mask=mask) for x in f])
    torch.testing.assert_close(torch.vmap(lambda x: gram_matrix(x, mask=mask))(f), each)
    torch.testing.assert_close(
        torch.vmap(lambda x, m: gram_matrix(x, mask=m))(f, mask.expand(4, 2, 5, 6)), each
    )
    last = f[0].to(memory_format=torch.channels_last).requires_grad_()
    loss = style_loss(last, target, mask=mask)
    torch.testing.assert_close(loss, style_loss(f[0], target, mask=mask))
    loss.backward()
    assert last.grad.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gram_matrix(f[0], mask=mask), each[0])
        torch.testing.assert_close(
            gram_matrix(f[0].bfloat16(), mask=mask.half()),
            gram_matrix(f[0].bfloat16().float(), mask=mask.half().float()),
        )


def test_the_same_bits_for_any_number_of_threads():
    f, target, mask = torch.randn(2, 33, 40, 41), torch.randn(33, 33), torch.rand(40, 41)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            leaf = f.clone().requires_grad_()
            loss = style_loss(leaf, target, mask=mask)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])
