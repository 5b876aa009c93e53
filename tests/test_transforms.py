"""torch.compile, autocast, vmap, torch.func and memory formats: the functions behave as torch's own do."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config

import deepsim_ext
from deepsim_ext import batch_hard_mine, batch_hard_triplet_loss, gram_matrix, reference, style_loss
from deepsim_ext.pair_distances import pair_distances

from .samples import batch_hard_samples


def batch(n, d=6, classes=4):
    return torch.randn(n, d, requires_grad=True), torch.randint(classes, (n,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_batch_hard_with_dynamic_shapes(reduction):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(x, labels, ref, ref_labels):
        own = batch_hard_triplet_loss(x, labels, reduction=reduction, return_stats=True)
        other = batch_hard_triplet_loss(x, labels, ref, ref_labels, distance="cosine", soft=True)
        return own.loss.sum() + own.mean_d_ap + other

    def eager(x, labels, ref, ref_labels):
        own = batch_hard_triplet_loss(x, labels, reduction=reduction, return_stats=True)
        return (
            own.loss.sum()
            + own.mean_d_ap
            + batch_hard_triplet_loss(x, labels, ref, ref_labels, distance="cosine", soft=True)
        )

    frames = None
    for n, m in ((12, 9), (21, 30), (34, 5)):
        inputs = (*batch(n), *batch(m))
        got, expected = step(*inputs), eager(*inputs)
        frames = frames or counter.frame_count
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(loss, (inputs[0], inputs[2])) for loss in (got, expected)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == frames  # later sizes need no new graph


# What is cached on disk knows the ops by their names, whatever an older build took for arguments.
@pytest.mark.slow
@torch._inductor.config.patch(force_disable_caches=True)
def test_compile_with_inductor():
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x, labels, f, target):
        loss = batch_hard_triplet_loss(x * 2, labels) + style_loss(
            [f, f.relu()], [target, target], weights=[1.0, 0.5]
        )
        return loss + deepsim_ext.content_loss(f, f.detach() * 0.9)

    for n in (10, 23):
        x, labels = batch(n)
        f, target = torch.randn(2, 5, n, n + 1, requires_grad=True), torch.randn(5, 5)
        loss = batch_hard_triplet_loss(x * 2, labels) + style_loss(
            [f, f.relu()], [target, target], weights=[1.0, 0.5]
        )
        loss = loss + deepsim_ext.content_loss(f, f.detach() * 0.9)
        got = step(x, labels, f, target)
        torch.testing.assert_close(got, loss)
        torch.testing.assert_close(torch.autograd.grad(got, (x, f)), torch.autograd.grad(loss, (x, f)))


def test_compile_style_loss_with_dynamic_shapes():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(style_loss, fullgraph=True, dynamic=True, backend=counter)
    target = torch.randn(5, 5)
    for b, h in ((2, 8), (3, 11), (4, 30)):
        f = torch.randn(b, 5, h, h + 1, requires_grad=True)
        got, expected = compiled(f, target, reduction="gatys"), style_loss(f, target, reduction="gatys")
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, f), torch.autograd.grad(expected, f))
    assert counter.frame_count == 1


def test_compile_mining():
    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(batch_hard_mine, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (9, 20):
            x, labels = batch(n)
            for got, expected in zip(compiled(x.detach(), labels), batch_hard_mine(x, labels), strict=True):
                assert torch.equal(got, expected)


def test_vmap_over_a_leading_batch():
    x, labels = torch.randn(5, 14, 6), torch.randint(4, (5, 14))
    ref, ref_labels = torch.randn(20, 6), torch.randint(4, (20,))
    got = torch.vmap(batch_hard_triplet_loss, in_dims=(0, 0, None, None))(x, labels, ref, ref_labels)
    one_by_one = [batch_hard_triplet_loss(a, b, ref, ref_labels) for a, b in zip(x, labels, strict=True)]
    assert torch.equal(got, torch.stack(one_by_one))
    f, target = torch.randn(3, 2, 4, 5, 6), torch.randn(4, 4)
    losses = torch.vmap(style_loss, in_dims=(0, None))(f, target)
    assert torch.equal(losses, torch.stack([style_loss(a, target) for a in f]))
    assert torch.equal(torch.vmap(gram_matrix)(f), torch.stack([gram_matrix(a) for a in f]))
    assert torch.equal(
        torch.vmap(gram_matrix, in_dims=1)(f), torch.stack([gram_matrix(a) for a in f.unbind(1)])
    )


@pytest.mark.parametrize("form", ["dual", "jvp"])
def test_forward_mode_is_refused_not_ignored(form):
    x, labels = torch.randn(8, 3), torch.arange(2).repeat(4)
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        if form == "jvp":
            torch.func.jvp(lambda x: batch_hard_triplet_loss(x, labels), (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            batch_hard_triplet_loss(torch.autograd.forward_ad.make_dual(x, x), labels)


def test_func_grad_and_its_compositions():
    x, labels = torch.randn(3, 10, 4, dtype=torch.float64), torch.randint(3, (3, 10))
    grad = torch.func.grad(batch_hard_triplet_loss)
    expected = [torch.autograd.grad(batch_hard_triplet_loss(a, b), a)[0] for a, b in _leaves(x, labels)]
    assert torch.equal(grad(x[0], labels[0]), expected[0])
    assert torch.equal(torch.vmap(grad)(x, labels), torch.stack(expected))
    ours, theirs = (
        torch.func.jacrev(torch.func.jacrev(lambda a, f=f: f(a, labels[0], margin=3.0)))(x[0])
        for f in (batch_hard_triplet_loss, reference.batch_hard_triplet_loss)
    )
    torch.testing.assert_close(ours, theirs)
    f, target = torch.randn(3, 1, 4, 5, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    for ours, theirs in ((style_loss, reference.style_loss), (_gram_sum, _reference_gram_sum)):
        got = torch.vmap(torch.func.grad(ours), in_dims=(0, None))(f, target)
        torch.testing.assert_close(got, torch.vmap(torch.func.grad(theirs), in_dims=(0, None))(f, target))


def losses_of_one_tensor():
    x, labels, f = torch.randn(8, 4), torch.arange(4).repeat_interleave(2), torch.randn(2, 3, 4, 4)
    p, n, target, y = torch.randn(8, 4), torch.randn(8, 4), torch.randn(3, 3), torch.arange(8) % 2
    return {
        "batch_hard": (lambda x: batch_hard_triplet_loss(x, labels, margin=5.0), x),
        "batch_all": (lambda x: deepsim_ext.batch_all_triplet_loss(x, labels, margin=5.0), x),
        "style": (lambda f: style_loss([f, 2 * f], [target, target]), f),
        "gram": (lambda f: gram_matrix(f).square().sum(), f),
        "triplet_margin": (lambda x: deepsim_ext.triplet_margin_loss(x, p, n, margin=5.0), x),
        "contrastive": (lambda x: deepsim_ext.contrastive_loss(x, p, y, margin=5.0), x),
        "pair_distances": (lambda x: pair_distances(x, p, labels, labels).sum(), x),
    }


TRANSFORMED = {
    "grad": torch.func.grad,
    "vmap": lambda f: lambda x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "vmap_grad": lambda f: lambda x: torch.vmap(torch.func.grad(f))(torch.stack([x, 2 * x])),
    "grad_grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()),
    "jacrev": torch.func.jacrev,
}


@pytest.mark.parametrize("loss", losses_of_one_tensor())
@pytest.mark.parametrize("transform", TRANSFORMED)
def test_compiled_transforms(loss, transform):
    torch.compiler.reset()
    function, x = losses_of_one_tensor()[loss]
    transformed = TRANSFORMED[transform](function)
    got = torch.compile(transformed, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, transformed(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", losses_of_one_tensor())
@pytest.mark.parametrize("form", ["dual", "jvp"])
def test_compiled_forward_mode_is_right_or_refused(loss, form):
    """Never a tangent that is silently 0, or missing."""
    torch.compiler.reset()
    function, x = losses_of_one_tensor()[loss]

    def tangent(x):
        if form == "jvp":
            return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent

    compiled = torch.compile(tangent, backend="aot_eager")
    if loss in ("triplet_margin", "contrastive", "pair_distances"):
        torch.testing.assert_close(compiled(x), torch.func.grad(function)(x).sum())
        return
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        compiled(x)


def _leaves(x, labels):
    return [(a.clone().requires_grad_(), b) for a, b in zip(x, labels, strict=True)]


def _gram_sum(f, target):
    return (gram_matrix(f) * target).square().sum()


def _reference_gram_sum(f, target):
    return (reference.gram_matrix(f) * target).square().sum()


def test_autocast_leaves_float32_alone_and_takes_mixed_dtypes():
    x, labels = batch(16)
    f, target = torch.randn(1, 4, 6, 6), torch.randn(4, 4)
    plain = batch_hard_triplet_loss(x, labels), style_loss(f, target), gram_matrix(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = batch_hard_triplet_loss(x, labels), style_loss(f, target), gram_matrix(f)
        # An embedding that a linear layer returned in bfloat16, against a float32 memory.
        half = torch.nn.functional.linear(x, torch.eye(6))
        assert half.dtype == torch.bfloat16
        mixed = batch_hard_triplet_loss(half, labels, x.detach(), labels)
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed, batch_hard_triplet_loss(half.float(), labels, x.detach(), labels))
        mixed.backward()
        style_loss(f.bfloat16(), target)
    assert x.grad.dtype == torch.float32
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_autocast_in_backward_of_backward():
    f, target = torch.randn(1, 4, 6, 6, requires_grad=True), torch.randn(4, 4)
    options = {"normalize": "hw", "reduction": "sum"}  # gradients of order 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (g,) = torch.autograd.grad(style_loss(f, target, **options), f, create_graph=True)
        (gg,) = torch.autograd.grad(g.square().sum(), f)
    (g,) = torch.autograd.grad(reference.style_loss(f, target, **options), f, create_graph=True)
    torch.testing.assert_close(gg, torch.autograd.grad(g.square().sum(), f)[0])


def test_autocast_in_backward_leaves_the_gradient_of_half_features_alone():
    f = torch.randn(1, 8, 5000).half().requires_grad_()
    loss = gram_matrix(f, normalize="hw").square().sum()
    (outside,) = torch.autograd.grad(loss, f, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (inside,) = torch.autograd.grad(loss, f)
    assert torch.equal(inside, outside)


def test_vmap_over_nothing_is_a_clear_error():
    with pytest.raises(ValueError, match="gram_matrix: torch.vmap needs at least one sample"):
        torch.vmap(gram_matrix)(torch.randn(0, 2, 3, 4))


def test_gradient_scaler():
    x, labels = batch(16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD([x], lr=1.0)
    before = x.detach().clone()
    scaler.scale(batch_hard_triplet_loss(x * torch.nan, labels)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(x, before)
    assert scaler.get_scale() == 2.0**15


def test_strides_do_not_matter():
    for sample in batch_hard_samples(torch.float32):
        x, labels, ref, ref_labels = sample.tensors
        for view in (
            x.t().contiguous().t(),
            torch.stack([x, x], -1)[..., 0],
            x.repeat(1, 2)[:, : x.shape[1]],
        ):
            assert torch.equal(view, x)
            got = batch_hard_triplet_loss(view, labels, ref, ref_labels)
            assert torch.equal(got, batch_hard_triplet_loss(x, labels, ref, ref_labels))
    expanded = torch.randn(1, 5, requires_grad=True)
    batch_hard_triplet_loss(expanded.expand(6, 5), torch.arange(6) // 2).backward()
    assert torch.equal(expanded.grad, torch.zeros(1, 5))


def test_channels_last_is_read_in_place_and_stays():
    f = torch.randn(2, 24, 9, 10)
    last = f.to(memory_format=torch.channels_last).requires_grad_()
    volume = torch.randn(2, 24, 3, 4, 5).to(memory_format=torch.channels_last_3d).requires_grad_()
    target = torch.randn(24, 24)
    torch.testing.assert_close(gram_matrix(last), gram_matrix(f))
    for x, memory_format in ((last, torch.channels_last), (volume, torch.channels_last_3d)):
        style_loss(x, target).backward()
        assert x.grad.is_contiguous(memory_format=memory_format)


def test_under_no_grad_and_inference_mode():
    x, labels = batch(12)
    f, target = torch.randn(1, 4, 6, requires_grad=True), torch.randn(4, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not batch_hard_triplet_loss(x, labels).requires_grad
            assert not style_loss(f, target).requires_grad


def test_use_inside_a_module_with_checkpointing():
    x, labels = batch(12)
    linear = torch.nn.Linear(6, 5)
    plain = batch_hard_triplet_loss(linear(x), labels)
    again = torch.utils.checkpoint.checkpoint(
        lambda a: batch_hard_triplet_loss(linear(a), labels), x, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(plain, x)[0], torch.autograd.grad(again, x)[0])
