"""What only a GPU can show: no waiting, graphs, memory, sizes. `pytest --on-cuda` tests the values."""

from __future__ import annotations

import pytest
import torch

from deepsim_ext import batch_hard_triplet_loss, gram_matrix, reference, style_loss

from .samples import balanced_labels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d, device="cuda").to(dtype).requires_grad_(), balanced_labels(n, 4).cuda()


def step(x: torch.Tensor, labels: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    loss = batch_hard_triplet_loss(x, labels, **options)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def style_step(f: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = style_loss(f, target)
    return loss.detach(), torch.autograd.grad(loss, f)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1000, 64), (5000, 128), (20000, 256)])
def test_large_batches_against_float64(n, d, dtype):
    x, labels = batch(n, d, dtype)
    loss, grad = step(x, labels)
    if n <= 5000:
        exact = reference.batch_hard_triplet_loss(x.detach().double(), labels)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step(x, labels), (loss, grad), strict=True))


def test_nothing_waits_for_the_device():
    x, labels = batch(3000, 64)
    f = torch.randn(1, 64, 50, 50, device="cuda", requires_grad=True)
    target = gram_matrix(torch.randn_like(f)).detach()
    step(x, labels, return_stats=False)
    style_step(f, target)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, labels)
        style_step(f, target)
        batch_hard_triplet_loss(x, labels, return_stats=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n", [200, 3000, 9000])
def test_graph_capture_and_replay(n):
    x, labels = batch(n, 96)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, labels)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for got, expected in zip(captured, step(x, labels), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(("n", "d", "dtype"), [(65536, 128, torch.float32), (262144, 32, torch.bfloat16)])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_memory(n, d, dtype, distance):
    """At most 64 N bytes beyond the gradient or, before there is one, a packed copy of the input."""
    x, labels = batch(n, d, dtype)
    step(x, labels, distance=distance)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step(x, labels, distance=distance)
    peak = torch.cuda.max_memory_allocated() - before
    gradient = n * d * x.element_size()
    packed = n * -(-d * x.element_size() // 128) * 128  # in chunks of 128 bytes
    assert peak <= max(gradient, packed) + 64 * n + 2**20
    assert result[0].isfinite()


def test_a_million_rows():
    x, labels = batch(2**20, 128, torch.bfloat16)
    loss, grad = step(x, labels)
    assert loss.isfinite()
    assert grad.isfinite().all()
    some = torch.randint(2**20, (64,), device="cuda")
    per_anchor = batch_hard_triplet_loss(x.detach(), labels, reduction="none")[some]
    exact = x.detach().double()
    for anchor, got in zip(some.tolist(), per_anchor.tolist(), strict=True):
        distance = (exact - exact[anchor]).square().sum(1).sqrt()
        same = labels == labels[anchor]
        positive = distance[same & (torch.arange(2**20, device="cuda") != anchor)].max()
        assert got == pytest.approx(
            (positive - distance[~same].min() + 0.2).clamp(min=0).item(), rel=1e-4, abs=1e-4
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_style_of_large_pictures_against_float64(dtype, memory_format):
    for c, side in ((64, 512), (512, 64), (70, 123)):
        f = torch.randn(2, c, side, side, device="cuda").relu().to(dtype, memory_format=memory_format)
        f.requires_grad_()
        target = torch.zeros(c, c, device="cuda")
        loss, grad = style_step(f, target)
        exact = f.detach().double().requires_grad_()
        expected = reference.style_loss(exact, target.double())
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
        (exact_grad,) = torch.autograd.grad(expected, exact)
        error = (grad.double() - exact_grad).norm() / exact_grad.norm()
        assert error < (1e-5 if dtype is torch.float32 else 5e-3)
        assert grad.is_contiguous(memory_format=memory_format)
        assert all(torch.equal(a, b) for a, b in zip(style_step(f, target), (loss, grad), strict=True))
