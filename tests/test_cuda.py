"""What only a GPU can show: no waiting, graphs, memory, sizes. `pytest --on-cuda` tests the values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist

from deepsim_ext import (
    batch_all_triplet_loss,
    batch_contrastive_loss,
    batch_hard_triplet_loss,
    batch_semi_hard_triplet_loss,
    cached_backward,
    contrastive_loss,
    distributed,
    evaluation,
    gram_matrix,
    nearest_neighbors,
    nn,
    reference,
    style_loss,
    triplet_margin_loss,
)
from deepsim_ext.compat import pytorch_metric_learning
from deepsim_ext.distributed import DistributedLoss
from deepsim_ext.pair_distances import pair_distances

from .samples import balanced_labels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, d, device="cuda").to(dtype).requires_grad_(), balanced_labels(n, 4).cuda()


PAIR_LOSSES = {
    "batch_all": batch_all_triplet_loss,
    "semi_hard": batch_semi_hard_triplet_loss,
    "contrastive": partial(batch_contrastive_loss, neg_margin=12.0),
    "contrastive_mean": partial(batch_contrastive_loss, neg_margin=12.0, reduction="mean"),
    "mining_strategies": partial(batch_hard_triplet_loss, positive="easy", negative="semihard"),
}


def step(
    x: torch.Tensor,
    labels: torch.Tensor,
    loss: Callable[..., torch.Tensor] = batch_hard_triplet_loss,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient of it times `scale`."""
    value = loss(x, labels)
    return value.detach(), torch.autograd.grad(scale * value, x)[0]


def given_triplets(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return triplet_margin_loss(x, x.roll(1, 0), x.roll(2, 0), swap=True, reduction="mean_nonzero")


def given_pairs(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return contrastive_loss(x, x.roll(1, 0), labels % 2, margin=14.0)


def listed_pairs(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(3 * len(x), device=x.device) % len(x)
    return pair_distances(x, x, rows, (rows * rows + 1) % len(x), distance="cosine").sum()


GIVEN = (given_triplets, given_pairs, listed_pairs)


def style_step(
    f: torch.Tensor, target: torch.Tensor, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    loss = style_loss(f, target)
    return loss.detach(), torch.autograd.grad(scale * loss, f)[0]


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
    losses = (batch_hard_triplet_loss, *PAIR_LOSSES.values())
    for loss in GIVEN:
        step(x, labels, loss)
    for loss in losses:
        step(x, labels, loss)
    style_step(f, target)
    nearest_neighbors(x, None, 5)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss in losses:
            step(x, labels, loss)
            loss(x, labels, return_stats=True)
        for loss in GIVEN:
            step(x, labels, loss)
        style_step(f, target)
        nearest_neighbors(x, None, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("loss", [batch_hard_triplet_loss, *PAIR_LOSSES.values(), *GIVEN])
@pytest.mark.parametrize("n", [200, 3000, 9000])
def test_graph_capture_and_replay(n, loss):
    x, labels = batch(n, 96)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, labels, loss)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, labels, loss)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for got, expected in zip(captured, step(x, labels, loss), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("n", [200, 9000])
def test_neighbours_in_a_graph(n):
    x = torch.randn(n, 96, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        nearest_neighbors(x, None, 20)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nearest_neighbors(x, None, 20)
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = nearest_neighbors(x, None, 20)
        assert torch.equal(captured.indices, expected.indices)
        assert torch.equal(captured.distances, expected.distances)


@pytest.mark.parametrize(("n", "d", "dtype"), [(65536, 128, torch.float32), (262144, 32, torch.bfloat16)])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_memory(n, d, dtype, distance):
    """At most 64 N bytes beyond the gradient or, before there is one, a packed copy of the input."""
    x, labels = batch(n, d, dtype)
    loss = partial(batch_hard_triplet_loss, distance=distance)
    step(x, labels, loss)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = step(x, labels, loss)
    peak = torch.cuda.max_memory_allocated() - before
    gradient = n * d * x.element_size()
    packed = n * -(-d * x.element_size() // 128) * 128  # in chunks of 128 bytes
    assert peak <= max(gradient, packed) + 64 * n + 2**20
    assert result[0].isfinite()


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_all_pairs_of_large_batches(name, dtype):
    """Against float64 by the same kernels, whose arithmetic alone differs. The same bits every time.

    Where strategies depend on which of two distances is larger, those that differ by rounding lead to other
    choices: of 18,000 pairs some dozens, each with a part in three rows of the gradient.
    """
    loss, scale = PAIR_LOSSES[name], 2.0**12  # float16 cannot hold gradients of a mean over millions of pairs
    x, labels = batch(6000, 128, dtype)
    step(x, labels, loss, scale)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value, grad = step(x, labels, loss, scale)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 3 * x.numel() * 4 + 64 * 2**20
    exact, exact_grad = step(x.detach().double().requires_grad_(), labels, loss, scale)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    tolerance = 1e-4 if dtype is torch.float32 else 5e-3
    chooses = name in ("semi_hard", "mining_strategies")
    error = (grad.double() - exact_grad).norm(dim=1 if chooses else None)
    right = error <= tolerance * exact_grad.norm(dim=1 if chooses else None)
    assert right.double().mean() >= (0.93 if chooses else 1)
    assert all(torch.equal(a, b) for a, b in zip(step(x, labels, loss, scale), (value, grad), strict=True))


@pytest.mark.parametrize("loss", GIVEN)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_many_given_rows(loss, dtype):
    """The same bits every time, and what the CPU makes of some of them in float64."""
    x, labels = batch(200_000, 128, dtype)
    value, grad = step(x, labels, loss, 2.0**14)
    assert all(torch.equal(a, b) for a, b in zip(step(x, labels, loss, 2.0**14), (value, grad), strict=True))
    some, few = x.detach()[:1000].requires_grad_(), labels[:1000]
    exact, exact_grad = step(some.detach().double().cpu().requires_grad_(), few.cpu(), loss)
    got, got_grad = step(some, few, loss)
    torch.testing.assert_close(got.double().cpu(), exact, rtol=1e-5, atol=0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-3)
    assert (got_grad.double().cpu() - exact_grad).norm() <= tolerance * exact_grad.norm()
    assert value.isfinite() and grad.isfinite().all()


def test_memory_of_a_loss_of_chunks():
    """torch.cdist's gradient alone would take 8 GiB of the batch, 1 GiB of the chunks that a CPU takes."""
    x, labels = batch(4096, 128)
    loss = pytorch_metric_learning.TripletMarginLoss(swap=True)
    step(x, labels, loss)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(x, labels, loss)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 768 * 2**20


def test_neighbours_in_a_large_gallery():
    gallery = torch.randn(100_000, 64, device="cuda")
    found = nearest_neighbors(gallery[:500], gallery, 20)
    exact = torch.cdist(gallery[:500].double(), gallery.double()).topk(20, largest=False)
    torch.testing.assert_close(found.distances.double(), exact.values, rtol=1e-5, atol=1e-6)
    assert (found.indices == exact.indices).float().mean() > 0.999


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
        exact = f.detach().double().requires_grad_()
        expected = reference.style_loss(exact, target.double())
        (exact_grad,) = torch.autograd.grad(expected, exact)
        scale = 1e-3 / exact_grad.abs().mean().item()  # which float16 can hold, as under a gradient scaler
        exact_grad *= scale
        loss, grad = style_step(f, target, scale)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
        error = (grad.double() - exact_grad).norm() / exact_grad.norm()
        assert error < (1e-5 if dtype is torch.float32 else 5e-3)
        assert grad.is_contiguous(memory_format=memory_format)
        assert all(torch.equal(a, b) for a, b in zip(style_step(f, target, scale), (loss, grad), strict=True))


def test_both_passes_of_chunks_draw_the_same_dropout():
    """Under autocast, too, of which backward sees nothing."""
    layers = (torch.nn.Linear(32, 64), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Linear(64, 16))
    model = torch.nn.Sequential(*layers).cuda()
    x, labels = batch(100, 32)
    x = x.detach()
    torch.manual_seed(1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = batch_hard_triplet_loss(torch.cat([model(chunk) for chunk in x.split(30)]), labels)
    loss.backward()
    expected, drawn_after = [p.grad for p in model.parameters()], torch.rand(3, device="cuda")
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        got = cached_backward(model, x, lambda e: batch_hard_triplet_loss(e, labels), chunk_size=30)
    assert torch.equal(got, loss)
    assert torch.equal(torch.rand(3, device="cuda"), drawn_after)
    *got, _ = (p.grad for p in model.parameters())  # no distance changes with the last bias
    for gradient, other in zip(got, expected[:-1], strict=True):
        assert (gradient - other).norm() <= 0.02 * other.norm()


@pytest.fixture
def nccl(tmp_path):
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def as_if_several(monkeypatch, group):
    """All that several ranks say to each other is said, over NCCL."""
    for module in ("loss", "neighbors", "evaluation"):
        monkeypatch.setattr(f"deepsim_ext.distributed.{module}.group_of", lambda function, _: group)


@pytest.mark.parametrize(("exchanging", "mode"), [(False, "auto"), (True, "gather"), (True, "ring")])
@pytest.mark.parametrize("with_memory", [False, True])
def test_distributed_loss_over_nccl(nccl, monkeypatch, exchanging, mode, with_memory):
    """Alone it is the loss itself."""
    if exchanging:
        as_if_several(monkeypatch, nccl)

    def make(loss: nn.embeddings.BatchLoss) -> torch.nn.Module:
        return nn.CrossBatchMemory(loss, 32, memory_size=128).cuda() if with_memory else loss

    for loss in (
        nn.BatchHardTripletLoss(),
        nn.BatchHardTripletLoss(positive="easy", negative="semihard"),
        nn.BatchAllTripletLoss(),
        nn.BatchSemiHardTripletLoss(),
        nn.BatchContrastiveLoss(neg_margin=12.0),
    ):
        plain, distributed = make(loss), DistributedLoss(make(loss), mode=mode)
        for _ in range(3):
            x, labels = batch(100, 32)
            expected, got = plain(x, labels), distributed(x, labels)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
            (grad,), (exact,) = torch.autograd.grad(got, x), torch.autograd.grad(expected, x)
            torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-6)


def test_copies_over_nccl(nccl, monkeypatch):
    """Tiles have no digit of their distances: anchors choose again."""
    as_if_several(monkeypatch, nccl)
    x, labels = batch(100, 32)
    x.data[50:] = x.data[:50]
    plain, distributed = nn.BatchHardTripletLoss(), DistributedLoss(nn.BatchHardTripletLoss(), mode="ring")
    expected, got = plain(x, labels), distributed(x, labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    (grad,), (exact,) = torch.autograd.grad(got, x), torch.autograd.grad(expected, x)
    torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-6)


def test_search_over_nccl(nccl, monkeypatch):
    as_if_several(monkeypatch, nccl)
    x, labels = batch(500, 32)
    x = x.detach()
    whole, found = nearest_neighbors(x, x.clone(), 7), distributed.nearest_neighbors(x, x.clone(), 7)
    assert found.indices.equal(whole.indices) and found.distances.equal(whole.distances)
    assert distributed.retrieval_metrics(x, labels) == evaluation.retrieval_metrics(x, labels)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_ops_of_a_ring(dtype, distance):
    """Those of several processes, most of which have no kernels here, agree with the CPU's."""
    g = torch.Generator().manual_seed(1)
    x, ref, others = (torch.randn(n, 20, generator=g).to(dtype) for n in (90, 70, 80))
    labels, ref_labels, other_labels = (torch.randint(9, (n,), generator=g) for n in (90, 70, 80))
    rows, ref_rows = (torch.randint(n, (500,), generator=g) for n in (90, 70))
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    center, weights = torch.zeros(20, dtype=torch.float64), torch.randn(500, generator=g).to(compute)
    tolerance = 1e-12 if dtype is torch.float64 else 2e-5

    def compare(name, *arguments):
        op = getattr(torch.ops.deepsim_ext, name)
        expected = op(*arguments)
        got = op(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments))
        if name == "batch_hard_extremes" and dtype is torch.float64:  # differences, which lose no digits
            expected, got = expected[:2] + expected[3:], got[:2] + got[3:]
        tensors = ([t] if isinstance(t, torch.Tensor) else t for t in (got, expected))
        for here, there in zip(*tensors, strict=True):
            assert here.is_cuda and here.dtype == there.dtype
            torch.testing.assert_close(here.cpu(), there, rtol=tolerance, atol=tolerance)
        return expected

    block = x, labels, ref, ref_labels
    chosen = compare("batch_hard_extremes", *block, center, distance)[1]
    assert (chosen >= 0).any()
    d = compare("pair_distances", x, ref, rows, ref_rows, distance)
    compare("pair_distances_backward", weights, d, x, ref, rows, ref_rows, distance)
    positives = compare("positive_distances", *block, center, distance)
    begin = torch.cat([torch.zeros(1).long(), (labels[:, None] == ref_labels).sum(dim=1).cumsum(0)])
    lists = x, labels, others, other_labels, begin, positives
    compare("semi_hard_negatives", *lists, center, distance)
    compare("batch_all_negatives", *lists, 0.2, False, center, distance, True)
