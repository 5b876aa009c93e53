"""GramAccumulator: a layer in chunks against the whole, in one pass and in two."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from deepsim_ext import GramAccumulator, gram_matrix, reference

from .samples import DTYPES

NORMALIZATIONS = ("none", "hw", "chw", "bchw", 37.5)
by_normalization = pytest.mark.parametrize("normalize", NORMALIZATIONS)
# Against float64 on the same values, of a norm; a half gradient is rounded to its dtype.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 5e-3, torch.float16: 1e-3}


def chunks(features: Tensor) -> list[Tensor]:
    """Ragged tiles along the first two spatial dimensions, or pieces along the only one."""
    parts = features.split([3, 1, features.shape[2] - 4], dim=2)
    if features.ndim == 3:
        return list(parts)
    return [tile for part in parts for tile in part.split(4, dim=3)]


@pytest.mark.parametrize("shape", [(2, 5, 70), (2, 40, 9, 11), (1, 3, 5, 6, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@by_normalization
def test_chunks_make_the_gram_matrix_of_the_whole_and_their_gradients_are_its_gradient(
    normalize, dtype, shape
):
    features = torch.randn(shape).to(dtype)
    exact = features.double().clone().requires_grad_()
    expected = reference.gram_matrix(exact, normalize=normalize)
    incoming = torch.randn(expected.shape, dtype=torch.float64)  # not symmetric
    (exact_grad,) = torch.autograd.grad(expected, exact, incoming)
    scale = 1 / exact_grad.abs().max().item()  # float16 gradients stay normal numbers

    accumulator = GramAccumulator(normalize=normalize)
    one_pass, two_passes = [features.clone().requires_grad_() for _ in range(2)]
    for chunk in chunks(one_pass):
        accumulator.update(chunk)
    got = accumulator.result()
    assert accumulator.positions == features[0, 0].numel()
    assert got.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (got - expected).norm() <= TOLERANCE[got.dtype] * expected.norm()
    grad_gram = (incoming * scale).to(got.dtype)
    got.backward(grad_gram)
    for chunk in chunks(two_passes):
        gradient = accumulator.gradient(chunk, grad_gram)
        assert gradient.dtype == dtype and not gradient.requires_grad
        chunk.backward(gradient)
    for leaf in (one_pass, two_passes):
        assert (leaf.grad - scale * exact_grad).norm() <= TOLERANCE[dtype] * scale * exact_grad.norm()


def network(tile: Tensor, filters: list[Tensor]) -> list[Tensor]:
    """Two layers of 1 x 1 convolutions: tiles have no border."""
    first = torch.nn.functional.conv2d(tile, filters[0]).tanh()
    return [first, torch.nn.functional.conv2d(first, filters[1]).relu()]


def test_a_picture_of_tiles_has_the_gradient_of_the_whole_with_one_tile_in_memory():
    """The two passes of the docstring, through a network and over two layers."""
    g = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    filters = [draw(6, 3, 1, 1), draw(4, 6, 1, 1)]
    picture, targets = draw(2, 3, 12, 10), [draw(6, 6), draw(4, 4)]

    whole = picture.clone().requires_grad_()
    layers = network(whole, filters)
    loss = sum(
        torch.nn.functional.mse_loss(gram_matrix(f), t.expand(2, -1, -1))
        for f, t in zip(layers, targets, strict=True)
    )
    loss.backward()

    tiles = [
        t.clone().requires_grad_()
        for part in picture.split([5, 7], dim=2)
        for t in part.split([3, 6, 1], dim=3)
    ]
    accumulators = [GramAccumulator(), GramAccumulator()]
    with torch.no_grad():
        for tile in tiles:
            for accumulator, chunk in zip(accumulators, network(tile, filters), strict=True):
                accumulator.update(chunk)
    grams = [accumulator.result().requires_grad_() for accumulator in accumulators]
    again = sum(
        torch.nn.functional.mse_loss(gram, t.expand(2, -1, -1))
        for gram, t in zip(grams, targets, strict=True)
    )
    again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-13, atol=0)
    for tile in tiles:
        parts = network(tile, filters)
        gradients = [
            accumulator.gradient(chunk, gram.grad)
            for accumulator, chunk, gram in zip(accumulators, parts, grams, strict=True)
        ]
        torch.autograd.backward(parts, gradients)
    rows = [torch.cat([t.grad for t in row], dim=3) for row in (tiles[:3], tiles[3:])]
    assert (torch.cat(rows, dim=2) - whole.grad).norm() <= 1e-13 * whole.grad.norm()


@by_normalization
def test_gradients_of_one_pass(normalize):
    features = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True)

    def gram(f: Tensor) -> Tensor:
        accumulator = GramAccumulator(normalize=normalize)
        for chunk in f.split([1, 3, 2], dim=2):
            accumulator.update(chunk)
        return accumulator.result()

    assert torch.autograd.gradcheck(gram, features) and torch.autograd.gradgradcheck(gram, features)


def test_updates_continue_after_a_result_and_leave_it_alone():
    first, second = torch.randn(2, 1, 4, 9)
    accumulator = GramAccumulator()
    accumulator.update(first)
    early = accumulator.result()
    kept = early.clone()
    accumulator.update(second)
    assert torch.equal(early, kept) and torch.equal(early, gram_matrix(first))
    torch.testing.assert_close(accumulator.result(), gram_matrix(torch.cat([first, second], dim=2)))


def test_half_chunks_do_not_overflow():
    features = torch.full((1, 3, 64), 300.0, dtype=torch.float16)
    accumulator = GramAccumulator(normalize="none")
    for chunk in features.split(16, dim=2):
        accumulator.update(chunk)
    assert torch.equal(accumulator.result(), torch.full((1, 3, 3), 300.0**2 * 64))


def updated() -> GramAccumulator:
    accumulator = GramAccumulator()
    accumulator.update(torch.zeros(2, 3, 5))
    return accumulator


FLOATS = "float32, float64, bfloat16 or float16"
FEATURES = f"{FLOATS} of shape [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0"
SAME = "of B=2, C=3 on cpu, computed in float32, as those before"
GRAM = "grad_gram must be of the shape of the Gram matrix [2, 3, 3]"
WRONG = [
    (lambda: GramAccumulator(normalize="c"), ValueError,
     'GramAccumulator: normalize must be one of "none", "hw", "chw", "bchw" or a finite number > 0, got "c"'),
    (lambda: GramAccumulator().result(), ValueError,
     "GramAccumulator.result: the chunks must be at least one, got none"),
    (lambda: GramAccumulator().gradient(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2)), ValueError,
     "GramAccumulator.gradient: the chunks must be at least one, got none"),
    (lambda: updated().update([1.0]), TypeError,
     f"GramAccumulator.update: chunk must be {FEATURES}, got list"),
    (lambda: updated().update(torch.zeros(2, 3, 0)), ValueError,
     f"GramAccumulator.update: chunk must be {FEATURES}, got float32 [2, 3, 0]"),
    (lambda: updated().update(torch.zeros(1, 3, 5)), ValueError,
     f"GramAccumulator.update: chunk must be {SAME}, got float32 [1, 3, 5] on cpu"),
    (lambda: updated().update(torch.zeros(2, 4, 5)), ValueError,
     f"GramAccumulator.update: chunk must be {SAME}, got float32 [2, 4, 5] on cpu"),
    (lambda: updated().update(torch.zeros(2, 3, 5).double()), TypeError,
     f"GramAccumulator.update: chunk must be {SAME}, got float64 [2, 3, 5] on cpu"),
    (lambda: updated().update(torch.zeros(2, 3, 5, device="meta")), ValueError,
     f"GramAccumulator.update: chunk must be {SAME}, got float32 [2, 3, 5] on meta"),
    (lambda: updated().gradient(torch.zeros(2, 4, 5), torch.zeros(2, 3, 3)), ValueError,
     f"GramAccumulator.gradient: chunk must be {SAME}, got float32 [2, 4, 5] on cpu"),
    (lambda: updated().gradient(torch.zeros(2, 3, 5), torch.zeros(3, 3)), ValueError,
     f"GramAccumulator.gradient: {GRAM}, got float32 [3, 3]"),
    (lambda: updated().gradient(torch.zeros(2, 3, 5), None), TypeError,
     f"GramAccumulator.gradient: {GRAM}, got None"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=[w[2][:80] for w in WRONG])
def test_errors(call, kind, message):
    with pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind and str(raised.value) == message


def test_what_raises_leaves_the_sum_as_it_was():
    accumulator = updated()
    with pytest.raises(ValueError):
        accumulator.update(torch.ones(2, 4, 5))
    assert accumulator.positions == 5 and not accumulator.result().any()
