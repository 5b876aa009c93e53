"""Losses over all triplets or pairs of a batch: the compiled ops against the reference, every contract."""

from __future__ import annotations

import math

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import (
    batch_all_triplet_loss,
    batch_contrastive_loss,
    batch_hard_triplet_loss,
    batch_semi_hard_triplet_loss,
    reference,
)

from .samples import DISTANCES, DTYPES, FORMS, Sample, balanced_labels, batch_hard_samples
from .test_batch_hard import leaves

ops = torch.ops.deepsim_ext

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_distance = pytest.mark.parametrize("distance", DISTANCES)

# The losses, each with options that make about half of the pairs of normal points matter.
LOSSES = {
    "all-mean": (batch_all_triplet_loss, {"margin": 0.5, "reduction": "mean"}),
    "all-mean_nonzero": (batch_all_triplet_loss, {"margin": 0.1, "reduction": "mean_nonzero"}),
    "all-sum": (batch_all_triplet_loss, {"margin": 1.0, "reduction": "sum"}),
    "window-mean": (batch_semi_hard_triplet_loss, {"margin": 0.5, "definition": "pml"}),
    "window-sum": (batch_semi_hard_triplet_loss, {"margin": 1.0, "definition": "pml", "reduction": "sum"}),
    "semi_hard-mean": (batch_semi_hard_triplet_loss, {"margin": 0.5}),
    "semi_hard-mean_nonzero": (batch_semi_hard_triplet_loss, {"margin": 0.5, "reduction": "mean_nonzero"}),
    "semi_hard-soft": (
        batch_semi_hard_triplet_loss,
        {"soft": True, "definition": "tfa", "reduction": "sum"},
    ),
    "contrastive-mean_nonzero": (batch_contrastive_loss, {"pos_margin": 0.3, "neg_margin": 3.0}),
    "contrastive-mean": (
        batch_contrastive_loss,
        {"pos_margin": 0.3, "neg_margin": 3.0, "squared": True, "reduction": "mean"},
    ),
    "contrastive-sum": (batch_contrastive_loss, {"neg_margin": 2.0, "reduction": "sum"}),
}
# In these a pair counts or does not count, by a comparison of two distances: where rounding decides, one of
# many triplets is another.
CHOOSING = ("window", "semi_hard")

# Where hundreds of rows are compared. The reference's tensors of all triplets take ten seconds for them.
LARGE = [("all-mean", torch.float32, "euclidean"), ("window-mean", torch.float64, "euclidean")]
LARGE += [
    (name, dtype, "euclidean")
    for name in LOSSES
    if name.startswith(("semi_hard", "contrastive"))
    for dtype in DTYPES[:2]
]

by_loss = pytest.mark.parametrize("name", LOSSES)


def twin(loss):
    return getattr(reference, loss.__name__)


def samples(dtype: torch.dtype = torch.float64, small: bool = False) -> list[Sample]:
    # Cosine distances in one column are all 0 or 2: rounding alone says which of two is larger.
    return [s for s in batch_hard_samples(dtype, small) if s.name != "one_column"]


@by_dtype
@by_distance
@by_loss
def test_values_statistics_and_gradients_match_the_reference(name, distance, dtype):
    loss, options = LOSSES[name]
    rounding = {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-5)
    gradient_rounding = {torch.float64: 1e-10, torch.float32: 3e-5}.get(dtype, 5e-3)
    if name.startswith(CHOOSING) and dtype is not torch.float64:
        rounding, gradient_rounding = 5e-3, 0.06
    for sample in samples(dtype):
        if len(sample.tensors[0]) > 150 and (name, dtype, distance) not in LARGE:
            continue
        ours = sample.fresh(requires_grad=True)
        exact = [t.double() if t is not None and t.is_floating_point() else t for t in sample.tensors]
        exact = Sample("", exact).fresh(requires_grad=True)
        got = loss(*ours, distance=distance, return_stats=True, **options)
        expected = twin(loss)(*exact, distance=distance, return_stats=True, **options)
        assert got._fields == expected._fields
        assert got.loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
        for field, x, y in zip(got._fields, got, expected, strict=True):
            assert x.shape == () and (x.dtype == torch.int64) == (y.dtype == torch.int64), field
            error = (x.detach().double() - y.detach().double()).abs()
            assert error <= rounding * (1e-2 + y.detach().double().abs()), (sample.name, field, x, y)
        incoming = torch.randn((), dtype=torch.float64).abs() + 0.5
        gradients = torch.autograd.grad(expected.loss, leaves(exact), incoming, retain_graph=True)
        largest = max((g.abs().max().item() for g in gradients if g.numel()), default=0.0)
        if largest > 1e-9:  # as a gradient scaler does: float16 gradients neither vanish nor overflow
            incoming *= 100 / largest
        got.loss.backward(incoming.to(got.loss.dtype))
        expected.loss.backward(incoming)
        for x, y in zip(leaves(ours), leaves(exact), strict=True):
            assert x.grad.dtype == dtype and x.grad.shape == y.grad.shape
            error = (x.grad.double() - y.grad).norm()
            assert error <= gradient_rounding * y.grad.norm() + 1e-12 * float(incoming), sample.name


@by_distance
@by_loss
def test_gradcheck_on_the_compiled_op(name, distance):
    loss, options = LOSSES[name]
    for sample in samples(small=True):
        tensors = sample.fresh(requires_grad=True)

        def value(*inputs, tensors=tensors):
            given = iter(inputs)
            arguments = [next(given) if t is not None and t.requires_grad else t for t in tensors]
            return loss(*arguments, distance=distance, **options)

        assert torch.autograd.gradcheck(value, leaves(tensors))
        # In a random direction: what torch's own operations make of the gradient's formula.
        assert torch.autograd.gradgradcheck(value, leaves(tensors), fast_mode=True)


OPS = {
    "batch_all_triplet_loss": (0.5, False),
    "batch_semi_hard_triplet_loss": (0.5, False),
    "batch_contrastive_loss": (0.3, 3.0, True),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(op, dtype):
    forward, backward = getattr(ops, op).default, getattr(ops, f"{op}_backward").default
    forms = [sample for sample in samples(dtype, small=True) if sample.name in FORMS]
    for sample, distance, reduction in zip(forms, DISTANCES, ("mean", "mean_nonzero", "sum"), strict=True):
        tensors = sample.fresh(requires_grad=True)
        options = (*OPS[op], distance, reduction)
        opcheck(forward, (*tensors, *options, True, True))
        opcheck(forward, (*(t if t is None else t.detach() for t in tensors), *options, False, False))
        with torch.no_grad():
            *_, grad, grad_ref = forward(*tensors, *options, True, True)
        opcheck(backward, (torch.ones((), dtype=grad.dtype), grad, grad_ref, *tensors, *options))
        if tensors[2] is not None:
            tensors[2].requires_grad_(False)
            opcheck(forward, (*tensors, *options, True, False))
            opcheck(backward, (torch.ones((), dtype=grad.dtype), grad, grad_ref[:0], *tensors, *options))


# ---- contracts ---------------------------------------------------------------------------------------------


@by_loss
@by_distance
def test_nothing_to_compare_gives_a_zero_that_is_connected_to_the_input(name, distance):
    loss, options = LOSSES[name]
    cases = [torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
    if loss is not batch_contrastive_loss:
        cases += [torch.zeros(70, dtype=torch.int64), torch.arange(70)]
    for labels in cases:
        x = torch.randn(len(labels), 3, requires_grad=True)
        value = loss(x, labels, distance=distance, **options)
        value.backward()
        assert value.item() == 0
        assert torch.equal(x.grad, torch.zeros_like(x))


@by_loss
def test_all_embeddings_equal(name):
    loss, options = LOSSES[name]
    labels = balanced_labels(100, 4, torch.Generator().manual_seed(0))
    x = torch.full((100, 8), 3.0, requires_grad=True)
    got = loss(x, labels, return_stats=True, **options)
    expected = twin(loss)(x.detach().double(), labels, return_stats=True, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.detach().double(), b.double())
    got.loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))  # d = 0 everywhere


@by_loss
@by_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_nan_or_inf_makes_the_loss_nan(name, dtype, bad):
    loss, options = LOSSES[name]
    labels = torch.arange(40) // 4
    for where in ("embeddings", "references"):
        x, ref = torch.randn(40, 6).to(dtype), torch.randn(40, 6).to(dtype)
        (x if where == "embeddings" else ref)[17, 3] = bad
        sets = [x.requires_grad_(), labels]
        if where == "references":
            sets += [ref.requires_grad_(), labels]
        result = loss(*sets, return_stats=True, **options)
        assert result.loss.isnan()
        result.loss.backward()
        assert all(t.grad.isnan().all() for t in leaves(sets))


@by_loss
def test_the_same_bits_for_any_number_of_threads(name):
    loss, options = LOSSES[name]
    g = torch.Generator().manual_seed(4)
    threads = torch.get_num_threads()
    for x, labels in (
        (torch.randn(700, 40, generator=g), balanced_labels(700, 7, g)),
        (torch.randn(500, 9, generator=g), torch.randint(3, (500,), generator=g)),
    ):
        found = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                leaf = x.clone().requires_grad_()
                value = loss(leaf, labels, **options)
                value.backward()
                found.append((value.detach(), leaf.grad))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(pair, found[0], strict=True))


@by_loss
def test_the_order_of_the_batch_does_not_matter(name):
    loss, options = LOSSES[name]
    g = torch.Generator().manual_seed(6)
    x = torch.randn(150, 12, generator=g, dtype=torch.float64)
    labels = torch.randint(20, (150,), generator=g)
    order = torch.randperm(150, generator=g)
    a, b = x.clone().requires_grad_(), x[order].clone().requires_grad_()
    values = loss(a, labels, **options), loss(b, labels[order], **options)
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    for value in values:
        value.backward()
    torch.testing.assert_close(a.grad[order], b.grad, rtol=1e-9, atol=1e-12)


@by_loss
@by_distance
def test_references_that_are_the_batch_are_the_self_form(name, distance):
    loss, options = LOSSES[name]
    x, labels = torch.randn(60, 5, dtype=torch.float64), torch.arange(60) // 5
    options = options | {"distance": distance}
    assert torch.equal(loss(x, labels, x, labels, **options), loss(x, labels, **options))


@pytest.mark.parametrize("name", ["all-mean", "contrastive-mean", "window-mean"])
def test_values_are_right_where_the_gram_form_cancels(name):
    """Tight heaps far from the origin: |a|^2 + |b|^2 - 2ab has no correct digit there."""
    loss, options = LOSSES[name]
    g = torch.Generator().manual_seed(5)
    # Two heaps 1e3 apart, classes in either within 0.1 of each other: half of the negatives are close pairs.
    heap = torch.tensor([[0.0], [1e3]]).repeat(100, 1)
    x = torch.randn(200, 16, generator=g) * 0.1 + heap + 100
    labels = torch.arange(200) // 5
    exact = twin(loss)(x.double(), labels, return_stats=True, **options)
    got = loss(x, labels, return_stats=True, **options)
    torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-3, atol=0)
    leaf, double = x.clone().requires_grad_(), x.double().requires_grad_()
    loss(leaf, labels, **options).backward()
    twin(loss)(double, labels, **options).backward()
    assert (leaf.grad.double() - double.grad).norm() <= 5e-3 * double.grad.norm()


def test_duplicates_tie_exactly():
    """A negative that equals the positive is not farther than it, in any tile."""
    g = torch.Generator().manual_seed(9)
    points = torch.randn(40, 24, generator=g) + 7
    x, labels = points.repeat(6, 1), torch.arange(240) % 3  # copies of a point carry all labels
    order = torch.randperm(240, generator=g)
    for definition in ("facenet", "pml"):
        got = batch_semi_hard_triplet_loss(
            x[order], labels[order], definition=definition, margin=2.0, return_stats=True
        )
        exact = reference.batch_semi_hard_triplet_loss(
            x[order].double(), labels[order], definition=definition, margin=2.0, return_stats=True
        )
        assert got.triplets == exact.triplets and got.active_triplets == exact.active_triplets
        torch.testing.assert_close(got.loss.double(), exact.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("definition", ["facenet", "pml"])
def test_rows_of_whole_numbers_tie_exactly(definition, distance, dtype):
    """Binary codes and points of a grid: many distances are equal, and none may be taken for a larger one."""
    g = torch.Generator().manual_seed(10)
    for x in (
        torch.randint(2, (170, 32), generator=g) * 2 - 1,
        torch.randint(-3, 4, (170, 2), generator=g) + 50,
    ):
        labels = torch.randint(9, (170,), generator=g)
        got, exact = (
            loss(x.to(t), labels, margin=2.0, definition=definition, distance=distance, return_stats=True)
            for loss, t in (
                (batch_semi_hard_triplet_loss, dtype),
                (reference.batch_semi_hard_triplet_loss, torch.float64),
            )
        )
        for field, a, b in zip(got._fields, got, exact, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=0, msg=field)


def test_a_single_triplet_costs_the_same_in_every_loss():
    """With one positive and one negative an anchor has one triplet."""
    x, refs = torch.randn(2, 2, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1])
    arguments = (x, labels, refs, labels)
    hard = batch_hard_triplet_loss(*arguments, margin=5.0)
    torch.testing.assert_close(batch_all_triplet_loss(*arguments, margin=5.0), hard)
    torch.testing.assert_close(batch_semi_hard_triplet_loss(*arguments, margin=5.0), hard)


@by_loss
@by_distance
def test_long_rows_are_nan_or_right_and_never_read_beyond_the_batch(name, distance):
    loss, options = LOSSES[name]
    labels = torch.arange(12) // 3
    direction = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    for length in (1e16, 3e17, 1e18, 2e18, 3e18, 8e18, 1.3e19, 1e20):
        x = direction / direction.norm(dim=1, keepdim=True) * length
        x = torch.cat([x, -x]).requires_grad_()
        value = loss(x, labels.repeat(2), distance=distance, **options)
        value.backward()
        exact = twin(loss)(x.detach().double(), labels.repeat(2), distance=distance, **options)
        if value.isfinite():
            torch.testing.assert_close(value.detach().double(), exact, rtol=1e-4, atol=1e-6)
        else:
            assert value.isnan() or exact > torch.finfo(torch.float32).max


@pytest.mark.parametrize("margin", [0.1, 0.7, 1.1, 3.1])
def test_margins_that_float32_rounds_either_way(margin):
    x, labels = torch.randn(40, 4) * 0.3, torch.arange(40) // 4
    for loss, options in (
        (batch_contrastive_loss, {"neg_margin": margin}),
        (batch_contrastive_loss, {"pos_margin": margin, "neg_margin": 2 * margin}),
        (batch_all_triplet_loss, {"margin": margin}),
        (batch_semi_hard_triplet_loss, {"margin": margin}),
    ):
        exact = twin(loss)(x.double(), labels, **options)
        torch.testing.assert_close(loss(x, labels, **options).double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("margin", [1e37, 3e38, 1e39, 1e300])
def test_margins_beyond_everything_count_every_triplet_and_pair_once(margin):
    x, labels = torch.randn(20, 4), torch.arange(20) // 4
    result = batch_all_triplet_loss(x, labels, margin=margin, reduction="mean", return_stats=True)
    assert result.active_triplets == result.triplets == 20 * 3 * 16
    torch.testing.assert_close(result.loss.item(), torch.tensor(margin, dtype=torch.float32).item())
    result = batch_contrastive_loss(x, labels, neg_margin=margin, reduction="mean_nonzero", return_stats=True)
    assert result.active_negative_pairs == result.negative_pairs == 20 * 16
    assert result.loss > min(0.2 * margin, 3e37)


def test_counts_of_large_classes_are_exact():
    """Beyond 2^24 triplets in a lane of float32."""
    x, labels = torch.zeros(32, 1), torch.zeros(32, dtype=torch.int64)
    refs = torch.zeros(400_000, 1)
    ref_labels = (torch.arange(400_000) >= 266_667).long()
    result = batch_all_triplet_loss(
        x, labels, refs, ref_labels, margin=10.0, reduction="mean", return_stats=True
    )
    assert result.triplets == result.active_triplets == 32 * 266_667 * 133_333
    torch.testing.assert_close(result.loss.item(), 10.0)


# ---- ways to call ------------------------------------------------------------------------------------------


@by_loss
def test_compiles_in_one_graph_with_dynamic_shapes(name):
    loss, options = LOSSES[name]
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, y: loss(x, y, return_stats=True, **options)[0], fullgraph=True, dynamic=True
    )
    for n in (20, 35):
        x, labels = torch.randn(n, 6, dtype=torch.float64), torch.arange(n) // 5
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        values = compiled(a, labels), loss(b, labels, **options)
        for value in values:
            value.backward()
        assert torch.equal(*values) and torch.equal(a.grad, b.grad)


@by_loss
def test_vmap_and_torch_func(name):
    loss, options = LOSSES[name]
    x, labels = torch.randn(3, 20, 6, dtype=torch.float64), torch.arange(20) // 5
    values = torch.vmap(lambda x: loss(x, labels, **options))(x)
    assert torch.equal(values, torch.stack([loss(each, labels, **options) for each in x]))
    gradients = torch.vmap(torch.func.grad(lambda x: loss(x, labels, **options)))(x)
    for each, gradient in zip(x, gradients, strict=True):
        leaf = each.clone().requires_grad_()
        loss(leaf, labels, **options).backward()
        torch.testing.assert_close(gradient, leaf.grad)


@by_loss
def test_without_a_gradient_wanted_none_is_formed(name):
    loss, options = LOSSES[name]
    x, labels = torch.randn(30, 4), torch.arange(30) // 3
    with torch.no_grad():
        assert not loss(x.requires_grad_(), labels, **options).requires_grad
    plain = loss(x.detach(), labels, **options)
    assert torch.equal(plain, loss(x, labels, **options).detach())


@by_loss
@by_distance
def test_the_gradient_of_references_is_formed_only_where_it_is_wanted(name, distance):
    """As for a memory of earlier batches. The anchors' gradients are the same, to the bit."""
    loss, options = LOSSES[name]
    x, ref = torch.randn(70, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    labels, ref_labels = torch.arange(70) // 5, torch.arange(50) // 4
    options = options | {"distance": distance}
    found = []
    for wanted in (True, False):
        leaf, others = x.clone().requires_grad_(), ref.clone().requires_grad_(wanted)
        value = loss(leaf, labels, others, ref_labels, **options)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        assert others.grad is None
        found.append((value.detach(), gradient.detach(), second))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    others = ref.clone().requires_grad_()
    loss(x, labels, others, ref_labels, **options).backward()
    assert others.grad.norm() > 0
    by_references = torch.func.grad(lambda ref: loss(x, labels, ref, ref_labels, **options))(ref)
    torch.testing.assert_close(by_references, others.grad)
    forward, kept = getattr(ops, loss.__name__), (x, labels, ref, ref_labels)
    grads = forward(*kept, *OPS[loss.__name__], distance, "sum", True, False)[-2:]
    assert [g.shape[0] for g in grads] == [70, 0]


def test_backward_of_a_forward_without_gradient_is_an_error():
    x, labels = torch.randn(30, 4, requires_grad=True), torch.arange(30) // 3
    options = (0.2, False, "euclidean", "mean")
    value, *_ = ops.batch_all_triplet_loss(x, labels, None, None, *options, False, False)
    with pytest.raises(ValueError, match="with_ref_gradient=True"):
        ref = torch.randn(20, 4, requires_grad=True)
        ops.batch_all_triplet_loss(x, labels, ref, labels[:20], *options, True, False)[0].backward()
    with pytest.raises(ValueError, match=r"grad_ref must be .*\[0, 4\]"):
        grad = torch.zeros(30, 4)
        ops.batch_all_triplet_loss_backward(
            torch.ones(()), grad, grad[:0, :3], x, labels, grad, labels, *options
        )
    with pytest.raises(ValueError, match="with_gradient=True"):
        value.backward()


@pytest.mark.parametrize("op", OPS)
def test_the_ops_guard_memory(op):
    x, labels = torch.randn(6, 3), torch.arange(6) // 2
    call = getattr(ops, op)
    tail = (*OPS[op], "euclidean", "mean", True, True)
    with pytest.raises(ValueError, match=r"labels must be of shape \[6\]"):
        call(x, labels[:5], None, None, *tail)
    with pytest.raises(TypeError, match="embeddings must be float32"):
        call(x.long(), labels, None, None, *tail)
    with pytest.raises(ValueError, match="reduction must be one of"):
        call(x, labels, None, None, *OPS[op], "euclidean", "none", True, True)
    with pytest.raises(ValueError, match="distance must be one of"):
        call(x, labels, None, None, *OPS[op], "l2", "mean", True, True)
