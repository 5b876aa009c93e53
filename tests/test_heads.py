"""Heads of Siamese networks: values and gradients against the formulas, and a head that learns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deepsim_ext import nn, reference
from deepsim_ext.verification import best_threshold

HALVES = (torch.float16, torch.bfloat16)


def features(n: int = 7, d: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides, >= 0, with entries that are 0 on one side, on the other and on both."""
    x1, x2 = torch.rand(2, n, d, dtype=torch.float64)
    x1[0, :3], x2[0, 1:4] = 0, 0
    return x1.to(dtype), x2.to(dtype)


def head(mode: str, d: int = 5, dtype: torch.dtype = torch.float64) -> nn.SiameseHead:
    made = nn.SiameseHead(d, mode=mode).to(dtype)
    with torch.no_grad():
        made.weight.normal_()
        made.bias.normal_()
    return made


def by_hand(made: nn.SiameseHead, x1: torch.Tensor, x2: torch.Tensor) -> list[float]:
    """The formulas in plain Python."""
    weight, bias = made.weight.tolist(), made.bias.item()
    values = []
    for a, b in zip(x1.tolist(), x2.tolist(), strict=True):
        total = bias
        for w, p, q in zip(weight, a, b, strict=True):
            if made.mode == "abs":
                total += w * abs(p - q)
            elif p + q:
                total += w * (p - q) ** 2 / (p + q)
        values.append(total)
    return values


# ---- values ------------------------------------------------------------------------------------------------


def test_distance_is_the_squared_one():
    x1, x2 = torch.randn(2, 6, 4, dtype=torch.float64) + 1e6
    for d, a, b in zip(nn.SiameseDistance()(x1, x2).tolist(), x1.tolist(), x2.tolist(), strict=True):
        assert d == pytest.approx(sum((p - q) ** 2 for p, q in zip(a, b, strict=True)), rel=1e-13)


@pytest.mark.parametrize("mode", ["abs", "chi2"])
def test_head_is_the_formula(mode):
    made, (x1, x2) = head(mode), features()
    logits = made(x1, x2)
    torch.testing.assert_close(
        logits, torch.tensor(by_hand(made, x1, x2), dtype=torch.float64), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(made.probability(x1, x2), logits.sigmoid())
    assert torch.equal(logits, made(x2, x1))


def test_head_of_equal_embeddings_is_its_bias():
    x = features()[0]
    for mode in ("abs", "chi2"):
        made = head(mode)
        assert torch.equal(made(x, x), made.bias.expand(7))


def test_chi2_of_tiny_features_does_not_underflow():
    made = head("chi2", 1, torch.float32)
    with torch.no_grad():
        made.weight.fill_(1)
        made.bias.zero_()
    x1, x2 = torch.tensor([[3e-30]]), torch.tensor([[1e-30]])
    assert made(x1, x2).item() == pytest.approx(1e-30, rel=1e-5, abs=0)


def test_chi2_of_opposite_features_is_what_the_formula_says():
    made = head("chi2", 1)
    with torch.no_grad():
        made.weight.fill_(1)
        made.bias.zero_()
    x1 = torch.tensor([[-3.0], [1.0]], dtype=torch.float64)
    x2 = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert made(x1, x2).tolist() == [-8.0, float("inf")]


def test_a_new_head_says_that_farther_is_less_alike():
    x1 = torch.zeros(3, 4)
    x2 = torch.tensor([0.0, 1.0, 2.0])[:, None].expand(3, 4)
    for mode in ("abs", "chi2"):
        assert nn.SiameseHead(4, mode=mode)(x1, x2).tolist() == [0.0, -1.0, -2.0]


def test_normalize():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [3e30, -4e30], [float("nan"), 1.0]])
    unit = nn.L2Normalize()(x)
    expected = [[0.6, 0.8], [0.0, 0.0], [1.0, 0.0], [0.6, -0.8]]
    torch.testing.assert_close(unit[:4], torch.tensor(expected))
    assert unit[4].isnan().all()
    assert nn.L2Normalize()(torch.tensor([[float("inf"), 1.0]])).isnan().any()
    assert nn.L2Normalize()(torch.empty(0, 3)).shape == (0, 3)


def test_no_pairs():
    empty = torch.empty(0, 5)
    assert nn.SiameseDistance()(empty, empty).shape == (0,)
    assert nn.SiameseHead(5)(empty, empty).shape == (0,)


# ---- gradients ---------------------------------------------------------------------------------------------


def modules() -> list[torch.nn.Module]:
    return [nn.SiameseDistance(), head("abs"), head("chi2")]


@pytest.mark.parametrize("index", range(3))
def test_gradients(index):
    module = modules()[index]
    pairs = [(torch.rand(4, 5, dtype=torch.float64) + 0.1).requires_grad_() for _ in range(2)]
    parameters = list(module.parameters())

    def function(x1, x2, *values):
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x1, x2))

    assert torch.autograd.gradcheck(function, [*pairs, *parameters])
    assert torch.autograd.gradgradcheck(function, [*pairs, *parameters])


def test_gradients_of_normalize():
    x = torch.randn(4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(nn.L2Normalize(), x)
    assert torch.autograd.gradgradcheck(nn.L2Normalize(), x)


@pytest.mark.parametrize("index", range(3))
def test_gradient_is_zero_where_both_are_zero(index):
    module = modules()[index]
    x1, x2 = torch.zeros(2, 3, 5, dtype=torch.float64, requires_grad=True).unbind()
    for gradient in torch.autograd.grad(module(x1, x2).sum(), (x1, x2)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_chi2_gradient_where_one_is_zero():
    made = head("chi2", 1)
    x1 = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    x2 = torch.full((1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    gradients = torch.autograd.grad(made(x1, x2).sum(), (x1, x2))
    weight = made.weight.item()  # of x2 at x1 = 0: d/dx1 = 2 r - r^2 and d/dx2 = -2 r - r^2, r = -1
    assert [g.item() for g in gradients] == pytest.approx([-3 * weight, weight], rel=1e-12)


def test_a_zero_row_has_no_gradient_and_others_do():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((nn.L2Normalize()(x) * torch.tensor([1.0, 2.0])).sum(), x)
    assert gradient[0].tolist() == [0.0, 0.0]
    # (g - u (u.g)) / |x| with g = (1, 2), u = (0.6, 0.8), |x| = 5
    assert gradient[1].tolist() == pytest.approx([-0.064, 0.048], rel=1e-12)


# ---- dtypes, autocast, compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_half_is_computed_in_float32(dtype):
    x1, x2 = features(dtype=dtype)
    assert torch.equal(
        nn.SiameseDistance()(x1 * 300, x2 * 300), nn.SiameseDistance()((x1 * 300).float(), (x2 * 300).float())
    )
    for mode in ("abs", "chi2"):
        made = head(mode, dtype=dtype)
        logits = made(x1, x2)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, made.float()(x1.float(), x2.float()))
    unit = nn.L2Normalize()(x1 * 300)
    assert unit.dtype == dtype
    assert torch.equal(unit, nn.L2Normalize()((x1 * 300).float()).to(dtype))


def test_autocast_mixes_dtypes_and_keeps_float32():
    x1, x2 = features(dtype=torch.float32)
    made = head("chi2", dtype=torch.float32)
    expected = made(x1.bfloat16().float(), x2)
    with pytest.raises(TypeError, match=r"^SiameseHead: x2 must be bfloat16 to match bfloat16 x1, got"):
        made(x1.bfloat16(), x2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = made(x1.bfloat16(), x2)
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)


def test_compiles():
    torch._dynamo.reset()
    made, normalize, distance = head("chi2", dtype=torch.float32), nn.L2Normalize(), nn.SiameseDistance()

    def whole(x1, x2):
        x1, x2 = normalize(x1), normalize(x2)
        return made(x1, x2) + distance(x1, x2)

    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        x1, x2 = features(n, dtype=torch.float32)
        torch.testing.assert_close(compiled(x1, x2), whole(x1, x2))


def test_distance_is_the_reference_contrastive_loss_of_same_pairs():
    x1, x2 = features()
    expected = reference.contrastive_loss(x1, x2, torch.ones(7), reduction="none")
    torch.testing.assert_close(nn.SiameseDistance()(x1, x2), expected, rtol=1e-13, atol=0)


# ---- errors ------------------------------------------------------------------------------------------------


def test_errors_word_for_word():
    x = torch.zeros(2, 3)
    for call, kind, text in [
        (lambda: nn.SiameseHead(0), ValueError, "embedding_size must be an integer >= 1, got int 0"),
        (lambda: nn.SiameseHead(2.0), TypeError, "embedding_size must be an integer >= 1, got float 2.0"),
        (
            lambda: nn.SiameseHead(3, mode="l1"),
            ValueError,
            'mode must be one of "abs", "chi2", got "l1"',
        ),
        (
            lambda: nn.SiameseHead(4)(x, x),
            ValueError,
            "x1 must be of shape [N, D]=[N, 4], got float32 [2, 3]",
        ),
        (
            lambda: nn.SiameseHead(3)(x, x[:1]),
            ValueError,
            "x2 must be of the shape of x1 [2, 3], got float32 [1, 3]",
        ),
    ]:
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == f"SiameseHead: {text}"
    with pytest.raises(TypeError, match=r"^SiameseDistance: x1 must be float32, .* got int64 \[2, 3\]$"):
        nn.SiameseDistance()(x.long(), x)
    with pytest.raises(ValueError, match=r"^L2Normalize: x must be .* of shape \[N, D\] with D >= 1, got"):
        nn.L2Normalize()(x[0])


# ---- learning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["abs", "chi2"])
def test_a_head_learns_which_features_tell_pairs_apart(mode):
    """Same pairs agree in the first 4 of 16 features only; an unweighted distance hardly sees it."""

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x1, x2 = torch.rand(2, n, 16)
        same = torch.rand(n) < 0.5
        x2[:, :4] = torch.where(same[:, None], (x1[:, :4] + 0.1 * torch.randn(n, 4)).clamp(min=0), x2[:, :4])
        return x1, x2, same

    made = nn.SiameseHead(16, mode=mode)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    for _ in range(200):
        x1, x2, same = draw(256)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(made(x1, x2), same.float()).backward()
        optimizer.step()
    x1, x2, same = draw(4000)
    with torch.no_grad():
        accuracy = ((made.probability(x1, x2) > 0.5) == same).float().mean().item()
    plain = best_threshold(nn.SiameseDistance()(x1, x2), same).accuracy
    assert accuracy > 0.92
    assert plain < 0.85
    assert made.weight[:4].max() < 5 * made.weight[4:].min()  # all negative, those that matter far more so
