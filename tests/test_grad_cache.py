"""cached_backward: gradients of one big forward, in chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from torch.testing import assert_close

from benchmarks.memory import peak_in_subprocess
from deepsim_ext import cached_backward, nn

LOSSES = {
    "hard": nn.BatchHardTripletLoss(margin=1.0),
    "hard-stats": nn.BatchHardTripletLoss(margin=1.0, return_stats=True),
    "semi_hard": nn.BatchSemiHardTripletLoss(margin=1.0),
    "all": nn.BatchAllTripletLoss(margin=1.0),
    "contrastive": nn.BatchContrastiveLoss(neg_margin=3.0, distance="sqeuclidean"),
    "contrastive-stats": nn.BatchContrastiveLoss(neg_margin=3.0, return_stats=True),
}
by_loss = pytest.mark.parametrize("name", LOSSES)
N, WIDTH, D = 22, 6, 4
LABELS = torch.arange(N) % 5
CRITERION = LOSSES["hard"]


def network(*between: Module, dtype: torch.dtype = torch.float64) -> Module:
    layers = (torch.nn.Linear(WIDTH, 16), *between, torch.nn.Tanh(), torch.nn.Linear(16, D))
    return torch.nn.Sequential(*layers).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, WIDTH, dtype=dtype)


def loss_of(embeddings: Tensor) -> Tensor:
    return CRITERION(embeddings, LABELS)


def gradients(model: Module) -> list[Tensor]:
    """Taken away from the parameters."""
    taken = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return taken


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """Relative, of all together: that of the last bias alone, with which no distance changes, is rounding."""
    a, b = (torch.cat([x.flatten() for x in each]) for each in (a, b))
    return ((a - b).norm() / b.norm()).item()


def in_one_go(model: Module, x: Tensor, loss: Callable[[Tensor], Any] = loss_of, chunk_size: int = N) -> Any:
    """What cached_backward computes, with all activations in memory."""
    result = loss(torch.cat([model(chunk) for chunk in x.split(chunk_size)]))
    getattr(result, "loss", result).backward()
    return result


# ---- values ------------------------------------------------------------------------------------------------


@by_loss
@pytest.mark.parametrize("chunk_size", [1, 5, 11, N, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_is_backward_of_one_big_forward(name, chunk_size, dtype):
    model, x = network(dtype=dtype), batch(dtype)
    expected = in_one_go(model, x, lambda e: LOSSES[name](e, LABELS))
    expected_gradients = gradients(model)
    got = cached_backward(model, x, lambda e: LOSSES[name](e, LABELS), chunk_size=chunk_size)
    assert type(got) is type(expected)
    values, expected_values = (list(r) if isinstance(r, tuple) else [r] for r in (got, expected))
    assert not any(value.requires_grad for value in values)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]
    for a, b in zip(values, expected_values, strict=True):
        assert_close(a, b.detach(), rtol=tolerance, atol=0)
    assert all(gradient.any() for gradient in expected_gradients)
    assert distance(gradients(model), expected_gradients) <= tolerance


def test_gradients_add_up():
    """Over calls, as those of backward do: gradient accumulation."""
    model, (x, y) = network(), (batch(), batch())
    for each in (x, y):
        in_one_go(model, each)
    expected = gradients(model)
    for each in (x, y):
        cached_backward(model, each, loss_of, chunk_size=5)
    assert_close(gradients(model), expected, rtol=1e-12, atol=1e-15)


def test_parameters_of_the_loss_get_their_gradients():
    model, scale, x = network(), torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64)), batch()
    in_one_go(model, x, lambda e: CRITERION(scale * e, LABELS))
    expected, expected_by_scale = gradients(model), scale.grad
    scale.grad = None
    cached_backward(model, x, lambda e: CRITERION(scale * e, LABELS), chunk_size=5)
    assert_close(gradients(model), expected, rtol=1e-12, atol=1e-15)
    assert_close(scale.grad, expected_by_scale, rtol=1e-12, atol=0)


def test_gradients_reach_inputs_that_require_them():
    model, x = network(), batch().requires_grad_()
    in_one_go(model, x)
    expected, x.grad = x.grad, None
    cached_backward(model, x, loss_of, chunk_size=5)
    assert_close(x.grad, expected, rtol=1e-12, atol=1e-15)


def test_a_cross_batch_memory_sees_the_batch_once():
    memories = [nn.CrossBatchMemory(CRITERION, D, memory_size=30).double() for _ in range(2)]
    model, inputs = network(), (batch(), batch())
    for x in inputs:
        in_one_go(model, x, lambda e: memories[0](e, LABELS))
    expected = gradients(model)
    for x in inputs:
        cached_backward(model, x, lambda e: memories[1](e, LABELS), chunk_size=5)
    assert distance(gradients(model), expected) <= 1e-12
    assert_close(memories[1].memory, memories[0].memory, rtol=1e-12, atol=1e-15)
    assert memories[1].filled == memories[0].filled == 30


# ---- inputs ------------------------------------------------------------------------------------------------


class TwoInputs(Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, image: Tensor, weight: Tensor) -> Tensor:
        return self.network(image) * weight[:, None]


@pytest.mark.parametrize("form", ["tuple", "dict", "tensors", "tuples", "dicts", "ragged"])
def test_forms_of_inputs(form):
    model, image, weight = TwoInputs(), batch(), torch.rand(N, dtype=torch.float64)
    loss_of(model(image, weight)).backward()
    expected = gradients(model)
    pairs = list(zip(image.split(4), weight.split(4), strict=True))
    sizes = [1, 9, N - 10]
    inputs, chunk_size = {
        "tuple": ((image, weight), 4),
        "dict": ({"weight": weight, "image": image}, 4),
        "tensors": ([torch.cat([a, b[:, None]], dim=1) for a, b in pairs], None),
        "tuples": (pairs, None),
        "dicts": ([{"image": a, "weight": b} for a, b in pairs], None),
        "ragged": (list(zip(image.split(sizes), weight.split(sizes), strict=True)), None),
    }[form]
    called = Columns(model) if form == "tensors" else model
    cached_backward(called, inputs, loss_of, chunk_size=chunk_size)
    assert_close(gradients(model), expected, rtol=1e-12, atol=1e-15)


class Columns(Module):
    """TwoInputs of one tensor."""

    def __init__(self, model: Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[:, :-1], x[:, -1])


class Texts(Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(128, D, dtype=torch.float64)

    def forward(self, texts: list[str]) -> Tensor:
        return torch.stack([self.table(torch.tensor(list(text.encode()))).mean(0) for text in texts])


def test_chunks_need_not_be_tensors():
    model, texts = Texts(), ["ape", "cat", "cow", "dog", "eel", "emu", "fox"]
    labels = torch.arange(7) % 3
    CRITERION(model(texts), labels).backward()
    expected = gradients(model)
    cached_backward(model, [texts[:3], texts[3:]], lambda e: CRITERION(e, labels))
    assert_close(gradients(model), expected, rtol=1e-12, atol=1e-15)


# ---- state: random numbers, buffers, autocast --------------------------------------------------------------


def test_both_passes_draw_the_same_dropout():
    """That of chunks embedded one after another; then come the loss's own draws, and what is drawn later."""
    model, x = network(torch.nn.Dropout(0.5)), batch()

    def loss(e: Tensor) -> Tensor:
        return loss_of(e) * torch.rand(())

    start = torch.get_rng_state()
    expected_loss = in_one_go(model, x, loss, chunk_size=5).detach()
    expected, drawn_after = gradients(model), torch.rand(3)
    torch.set_rng_state(start)
    assert torch.equal(cached_backward(model, x, loss, chunk_size=5), expected_loss)
    assert torch.equal(torch.rand(3), drawn_after)
    assert_close(gradients(model), expected, rtol=1e-12, atol=1e-15)


class Wandering(Module):
    """Its output depends on buffers that every call changes; one in place, the other by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(()))
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.shift += x.detach().mean()
        self.factor = self.factor * 1.1
        return x * self.factor + self.shift


@pytest.mark.parametrize("between", [Wandering, lambda: torch.nn.BatchNorm1d(16)], ids=["wandering", "norm"])
def test_buffers_change_as_by_one_pass(between):
    model, x = network(between()), batch()
    other = copy.deepcopy(model)
    expected = in_one_go(other, x, chunk_size=6).detach()
    assert_close(cached_backward(model, x, loss_of, chunk_size=6), expected, rtol=1e-12, atol=0)
    assert_close(gradients(model), gradients(other), rtol=1e-12, atol=1e-15)
    for (name, buffer), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


def test_buffers_stay_where_the_first_pass_fails():
    model = network(torch.nn.BatchNorm1d(16))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        cached_backward(model, [batch(), torch.zeros(3, WIDTH + 1, dtype=torch.float64)], loss_of)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


class InFloat32(torch.autograd.Function):
    """x @ w^T, whose backward autocast would do in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        with torch.autocast("cpu", enabled=False):
            return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class Precise(Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return InFloat32.apply(x.float(), self.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_holds_for_both_passes_and_not_for_backward(dtype):
    model, x = network(Precise(), dtype=torch.float32), batch(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        embeddings = model(x)
        loss = loss_of(embeddings)
    loss.backward()
    expected = gradients(model)
    seen = []

    def criterion(e: Tensor) -> Tensor:
        seen.append(e.detach())
        return loss_of(e)

    with torch.autocast("cpu", dtype=dtype):
        got = cached_backward(model, x, criterion, chunk_size=5)
    assert embeddings.dtype == dtype
    assert torch.equal(seen[0], embeddings)
    assert torch.equal(got, loss)
    # Weights that were cast to half get half gradients, here added up over chunks.
    got = gradients(model)
    assert distance(got, expected) <= torch.finfo(dtype).eps
    precise = [name for name, _ in model.named_parameters()].index("1.weight")
    assert distance([got[precise]], [expected[precise]]) <= 1e-6


def test_grad_scaler():
    """Gradients times the scale, until scaler.step takes it out; the loss comes as it is."""
    model, x = network(dtype=torch.float32), batch(torch.float32)
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**12) for _ in optimizers]
    expected = loss_of(other(x))
    scalers[1].scale(expected).backward()
    statistics = nn.BatchHardTripletLoss(margin=1.0, return_stats=True)
    got = cached_backward(model, x, lambda e: statistics(e, LABELS), chunk_size=5, scaler=scalers[0])
    assert_close(got.loss, expected.detach(), rtol=1e-6, atol=0)
    grads = [[p.grad.clone() for p in m.parameters()] for m in (model, other)]
    assert_close(*grads, rtol=1e-5, atol=1e-3)
    assert max(g.abs().max() for g in grads[0]) > 2**8
    for scaler, optimizer in zip(scalers, optimizers, strict=True):
        scaler.step(optimizer)
        scaler.update()
    assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-5, atol=1e-6)


# ---- memory ------------------------------------------------------------------------------------------------

ROWS, FEATURES, LAYERS, CHUNK = 8192, 256, 8, 512


def step_probe(way: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The call to measure, and the same on few rows to warm up; parameters have their gradients already."""
    layers = [
        layer for _ in range(LAYERS) for layer in (torch.nn.Linear(FEATURES, FEATURES), torch.nn.ReLU())
    ]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(FEATURES, 16))

    def step(rows: int) -> Callable[[], object]:
        x, labels = torch.randn(rows, FEATURES), torch.arange(rows) // 4
        if way == "chunks":
            return lambda: cached_backward(model, x, lambda e: CRITERION(e, labels), chunk_size=CHUNK)
        return lambda: CRITERION(model(x), labels).backward()

    return step(ROWS), step(64)


def test_memory_is_that_of_a_chunk():
    """A chunk's activations twice over (they and their gradients), and what the loss and a BLAS need."""
    activations = 4 * ROWS * FEATURES * LAYERS  # ReLU's output alone is kept, the next layer's input
    probe = "tests.test_grad_cache:step_probe"
    chunks, whole = (peak_in_subprocess(probe, way) for way in ("chunks", "whole"))
    assert whole > activations
    assert chunks < 2 * activations * CHUNK / ROWS + 16 * 2**20


# ---- errors ------------------------------------------------------------------------------------------------

MODEL, X = network(dtype=torch.float32), torch.zeros(N, WIDTH)
CHUNKED = {"chunk_size": 4}
EMBEDDINGS = "float32, float64, bfloat16 or float16 of shape [n, D] with n >= 1 and D >= 1, got "
SCALAR = (
    "the result of loss must be a float32, float64, bfloat16 or float16 scalar, or a named tuple with such a"
    " loss, got "
)
UNRELATED = "the result of loss must be a function of the embeddings, with a gradient, got one without"


class Output(Module):
    """`f` of a Linear layer's output."""

    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.f = torch.nn.Linear(WIDTH, D), f

    def forward(self, x: Tensor) -> Any:
        return self.f(self.layer(x))


@pytest.mark.parametrize(
    ("model", "inputs", "loss", "options", "kind", "message"),
    [
        (lambda x: x, X, loss_of, CHUNKED, TypeError, "model must be an nn.Module, got function"),
        (MODEL, X, X, CHUNKED, TypeError, "loss must be a function of the embeddings, got float32 [22, 6]"),
        (MODEL, X, loss_of, {"chunk_size": 4, "scaler": 2.0}, TypeError,
         "scaler must be a torch.amp.GradScaler or None, got float 2.0"),
        (MODEL, X, loss_of, {}, TypeError, "chunk_size must be an integer >= 1, got None"),
        (MODEL, X, loss_of, {"chunk_size": 0}, ValueError, "chunk_size must be an integer >= 1, got int 0"),
        (MODEL, [X], loss_of, CHUNKED, ValueError,
         "chunk_size must be None where inputs is a list of chunks, got int 4"),
        (MODEL, [], loss_of, {}, ValueError, "inputs must be at least one chunk, got an empty list"),
        (MODEL, (), loss_of, CHUNKED, ValueError, "inputs must be at least one tensor, got an empty tuple"),
        (MODEL, "X", loss_of, CHUNKED, TypeError,
         'inputs must be a tensor, a tuple or dict of tensors, or a list of chunks, got "X"'),
        (MODEL, (X, 3), loss_of, CHUNKED, TypeError, "inputs[1] must be a tensor, got int 3"),
        (MODEL, X[:0], loss_of, CHUNKED, ValueError,
         "inputs must be of shape [N, ...] with N >= 1, got float32 [0, 6]"),
        (MODEL, X.sum(), loss_of, CHUNKED, ValueError,
         "inputs must be of shape [N, ...] with N >= 1, got float32 []"),
        (MODEL, {"a": X, "b": X[:3]}, loss_of, CHUNKED, ValueError,
         "inputs['b'] must be of shape [N, ...]=[22, ...], got float32 [3, 6]"),
        (MODEL, [X, X[:0]], loss_of, {}, ValueError,
         f"the output of model must be {EMBEDDINGS}float32 [0, 4]"),
        (Output(lambda e: e[:, 0]), X, loss_of, CHUNKED, ValueError,
         f"the output of model must be {EMBEDDINGS}float32 [4]"),
        (Output(lambda e: (e, e)), X, loss_of, CHUNKED, TypeError,
         f"the output of model must be {EMBEDDINGS}tuple"),
        (Output(lambda e: e.long()), X, loss_of, CHUNKED, TypeError,
         f"the output of model must be {EMBEDDINGS}int64 [4, 4]"),
        (Output(lambda e: e[:, : len(e)]), X[:6], loss_of, CHUNKED, ValueError,
         "the output of model must be of shape [n, D]=[n, 4], got float32 [2, 2]"),
        (MODEL, X, lambda e: e.sum(1), CHUNKED, ValueError, f"{SCALAR}float32 [22]"),
        (MODEL, X, lambda e: 1.0, CHUNKED, TypeError, f"{SCALAR}float 1.0"),
        (MODEL, X, lambda e: e.detach().sum(), CHUNKED, ValueError, UNRELATED),
        (MODEL, X, lambda e: torch.ones((), requires_grad=True) * 2, CHUNKED, ValueError, UNRELATED),
    ],
)  # fmt: skip
def test_errors(model, inputs, loss, options, kind, message):
    with pytest.raises(kind) as raised:
        cached_backward(model, inputs, loss, **options)
    assert type(raised.value) is kind and str(raised.value) == f"cached_backward: {message}"
    if isinstance(model, Module):
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_has_nothing_to_go_back_to():
    frozen = torch.nn.Linear(WIDTH, 4).requires_grad_(False)
    with pytest.raises(ValueError, match="^cached_backward: the output of model must be of parameters"):
        cached_backward(frozen, X, lambda e: e.sum(), **CHUNKED)
