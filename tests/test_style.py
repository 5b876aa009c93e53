"""Style loss: the compiled ops against the reference, and every contract."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.library import opcheck

from deepsim_ext import gram_matrix, reference, style_loss

from .samples import DTYPES, style_samples
from .test_gram import NORMALIZATIONS, TOLERANCE, assert_close, compute_dtype

ops = torch.ops.deepsim_ext

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# What is made of the difference of two Gram matrices.
DIFFERENCES = [(r, d) for r in ("mean", "sum", "gatys") for d in ("l2", "l1")] + [("sum", "frobenius")]
by_difference = pytest.mark.parametrize(("reduction", "distance"), DIFFERENCES)


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


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_all_layers_are_one_op_and_so_is_their_gradient(compiled):
    torch.compiler.reset()
    shapes = ((1, 4, 6, 5), (2, 3, 4, 4), (1, 7, 2, 2))
    features = [torch.randn(s, requires_grad=i != 1) for i, s in enumerate(shapes)]
    targets = [torch.randn(s[1], s[1]) for s in shapes]

    def loss(features, targets):
        return style_loss(features, targets, weights=[1.0, 2.0, 3.0])

    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    function(features, targets).backward()  # a first time, for the compiler
    grads = [f.grad for f in features]
    for f in features:
        f.grad = None
    with torch.profiler.profile() as profile:
        function(features, targets).backward()
    ops_run = [e.name for e in profile.events() if e.name.startswith("deepsim_ext::")]
    assert ops_run == ["deepsim_ext::style_loss", "deepsim_ext::style_loss_backward"]
    assert features[1].grad is None
    expected = [f.detach().double().requires_grad_() for f in features]
    reference.style_loss(expected, [t.double() for t in targets], weights=[1.0, 2.0, 3.0]).backward()
    for i in (0, 2):
        assert torch.equal(features[i].grad, grads[i])
        assert_close(features[i].grad, expected[i].grad, 1e-5)


@by_difference
def test_many_layers_of_several_dtypes(distance, reduction):
    """More than one op takes, and some that cannot share one."""
    options = {"normalize": "hw", "reduction": reduction, "distance": distance}
    shapes = [(1 + i % 2, 2 + i % 5, 3, 2 + i % 3) for i in range(21)]
    dtypes = [(torch.float32, torch.bfloat16)[i % 4 == 3] for i in range(21)]
    weights = [0.1 * i - 0.5 for i in range(21)]
    features = [torch.randn(s).to(d).requires_grad_() for s, d in zip(shapes, dtypes, strict=True)]
    targets = [torch.randn(s[1], s[1], requires_grad=i % 2 > 0) for i, s in enumerate(shapes)]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (*features, *targets)]
    got = style_loss(features, targets, weights=weights, **options)
    expected = reference.style_loss(exact[:21], exact[21:], weights=weights, **options)
    assert_close(got.detach(), expected.detach(), 1e-5)
    got.backward()
    expected.backward()
    for t, e in zip((*features, *targets), exact, strict=True):
        if t.requires_grad:
            assert_close(t.grad, e.grad, max(TOLERANCE[t.dtype], 1e-5))
        else:
            assert t.grad is None


def test_gradients_of_layers_double_backward_and_vmap():
    f, g = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    targets = [torch.randn(3, 3, dtype=torch.float64), torch.randn(2, 3, 3, dtype=torch.float64)]

    def loss(f, g, distance):
        reduction = "sum" if distance == "frobenius" else "mean"
        return style_loss([f, g], targets, weights=[1.0, -2.0], reduction=reduction, distance=distance)

    for distance in ("l2", "l1", "frobenius"):
        step = functools.partial(loss, distance=distance)
        assert torch.autograd.gradcheck(step, (f, g))
        assert torch.autograd.gradgradcheck(step, (f, g))
        samples = [torch.randn(4, 2, 3, 4, dtype=torch.float64) for _ in range(2)]
        values = torch.vmap(torch.func.grad(step, argnums=(0, 1)))(*samples)
        for i in range(4):
            one = torch.func.grad(step, argnums=(0, 1))(samples[0][i], samples[1][i])
            for all_of_them, single in zip(values, one, strict=True):
                torch.testing.assert_close(all_of_them[i], single)


@by_difference
def test_gradcheck_on_the_compiled_op(distance, reduction):
    for sample in style_samples(small=True):

        def loss(features, target):
            return style_loss(features, target, normalize="hw", reduction=reduction, distance=distance)

        assert torch.autograd.gradcheck(loss, sample.fresh(requires_grad=True))
        assert torch.autograd.gradgradcheck(loss, sample.fresh(requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("distance", ["l2", "l1", "frobenius"])
def test_opcheck(dtype, distance):
    samples = [s for s in style_samples(dtype, small=True) if s.name.endswith(("-each", "-shared"))]
    features = [s.tensors[0].flatten(2).detach().requires_grad_() for s in samples]
    targets = [s.tensors[1].reshape(-1, *s.tensors[1].shape[-2:]).detach().requires_grad_() for s in samples]
    weights = [0.5 + i for i in range(len(samples))]
    options = (weights, "chw", 1.0, "sum" if distance == "frobenius" else "mean", distance)
    opcheck(ops.style_loss.default, (features, targets, *options))
    with torch.no_grad():
        loss, losses, residuals = ops.style_loss(features, targets, *options)
    wanted = [i % 3 > 0 for i in range(len(samples))]
    detached = [f.detach() for f in features]
    opcheck(
        ops.style_loss_backward.default,
        (torch.rand_like(loss), losses, residuals, detached, wanted, *options),
    )


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


OP_ERRORS = {  # what is changed: the op with the error, and its text
    "no layer": (0, lambda: {"features": []}, "features must be 1 to 16 layers, got 0"),
    "too many layers": (
        0,
        lambda: {"features": [torch.rand(1, 2, 3)] * 17},
        "features must be 1 to 16 layers, got 17",
    ),
    "a weight too many": (
        0,
        lambda: {"weights": [1.0] * 3},
        "weights must be one number for each of 2 layers, got 3",
    ),
    "a target too few": (
        0,
        lambda: {"target": [torch.rand(1, 3, 3)]},
        "target must be one matrix for each of 2 layers",
    ),
    "a small target": (
        0,
        lambda: {"target": [torch.rand(1, 3, 2), torch.rand(1, 5, 5)]},
        r"target must be .*\[1, 3, 3\]",
    ),
    "two dtypes": (
        0,
        lambda: {"features": [torch.rand(2, 3, 4), torch.rand(1, 5, 6).double()]},
        "one dtype and device",
    ),
    "empty features": (
        0,
        lambda: {"features": [torch.rand(2, 3, 4), torch.rand(1, 5, 0)]},
        "features must not be empty",
    ),
    "flat features": (
        0,
        lambda: {"features": [torch.rand(2, 3, 4), torch.rand(5, 6)]},
        "features must have 3 dimensions",
    ),
    "a reduction": (
        0,
        lambda: {"reduction": "max"},
        "reduction must be one of 'mean', 'sum', 'gatys', got 'max'",
    ),
    "a distance": (
        0,
        lambda: {"distance": "l3"},
        "distance must be one of 'l2', 'l1', 'frobenius', got 'l3'",
    ),
    "a normalisation": (
        0,
        lambda: {"normalize": "c"},
        "normalize must be one of 'none', 'hw', 'chw', 'bchw', got 'c'",
    ),
    "few residuals": (1, lambda: {"residuals": torch.rand(42)}, r"residuals must be .*\[43\]"),
    "few losses": (1, lambda: {"losses": torch.rand(1)}, r"losses must be .*\[2\]"),
    "many gradients": (1, lambda: {"grad_loss": torch.rand(1)}, r"grad_loss must be .*\[\]"),
    "a wish too few": (1, lambda: {"wanted": [True]}, "wanted must be one bool for each of 2 layers, got 1"),
}


@pytest.mark.parametrize("name", OP_ERRORS)
def test_the_ops_guard_memory(name):
    which, changed, text = OP_ERRORS[name]
    options = {
        "weights": [1.0] * 2,
        "normalize": "chw",
        "divisor": 1.0,
        "reduction": "mean",
        "distance": "l2",
    }
    features = [torch.rand(2, 3, 4), torch.rand(1, 5, 6)]
    targets = [torch.rand(1, 3, 3), torch.rand(1, 5, 5)]
    forward = {"features": features, "target": targets, **options}
    loss, losses, residuals = ops.style_loss(**forward)
    backward = {
        "grad_loss": loss,
        "losses": losses,
        "residuals": residuals,
        "features": features,
        "wanted": [True, False],
        **options,
    }
    assert [g.numel() for g in ops.style_loss_backward(**backward)] == [24, 0]
    op, right = ((ops.style_loss, forward), (ops.style_loss_backward, backward))[which]
    with pytest.raises(ValueError, match=text):
        op(**right | changed())
