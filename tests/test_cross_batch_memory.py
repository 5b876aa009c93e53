"""nn.CrossBatchMemory: against lists of earlier batches, its state, and what it does with bad input."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor

from deepsim_ext import functional, nn

D = 5
# A module, and the function it stands for with the same options.
LOSSES = {
    "hard": (nn.BatchHardTripletLoss, functional.batch_hard_triplet_loss, {"margin": 0.5}),
    "hard-soft": (
        nn.BatchHardTripletLoss,
        functional.batch_hard_triplet_loss,
        {"soft": True, "reduction": "sum"},
    ),
    "semi_hard": (nn.BatchSemiHardTripletLoss, functional.batch_semi_hard_triplet_loss, {"margin": 0.5}),
    "all": (nn.BatchAllTripletLoss, functional.batch_all_triplet_loss, {"margin": 0.5}),
    "contrastive": (
        nn.BatchContrastiveLoss,
        functional.batch_contrastive_loss,
        {"neg_margin": 3.0, "distance": "sqeuclidean"},
    ),
}
by_loss = pytest.mark.parametrize("name", LOSSES)


def pair(name: str) -> tuple[torch.nn.Module, partial]:
    module, function, options = LOSSES[name]
    return module(**options), partial(function, **options)


def stream(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of these sizes, over and over."""
    g = torch.Generator().manual_seed(seed)
    while True:
        for n in sizes:
            yield torch.randn(n, D, generator=g).to(dtype), torch.randint(4, (n,), generator=g)


def step(memory: nn.CrossBatchMemory, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    x = x.clone().requires_grad_()
    loss = memory(x, labels)
    loss.backward()
    return loss.detach(), x.grad


def same_state(a: nn.CrossBatchMemory, b: nn.CrossBatchMemory) -> bool:
    return (
        a.get_extra_state() == b.get_extra_state()
        and torch.equal(a.memory, b.memory)
        and torch.equal(a.memory_labels, b.memory_labels)
    )


@by_loss
@pytest.mark.parametrize(
    ("sizes", "memory_size"),
    [((8,), 30), ((8,), 16), ((7, 3, 0, 5), 12), ((20, 4), 9), ((6,), 6), ((1,), 4)],
    ids=["wraps_around", "full", "ragged", "larger_than_memory", "one_batch", "one_row"],
)
def test_is_the_loss_of_the_batch_and_against_the_latest_rows_of_earlier_batches(name, sizes, memory_size):
    loss, function = pair(name)
    memory = nn.CrossBatchMemory(loss, D, memory_size=memory_size, weight=0.7)
    rows, row_labels = torch.zeros(0, D), torch.zeros(0, dtype=torch.int64)
    for x, labels in islice(stream(*sizes), 12):
        got = step(memory, x, labels)
        leaf = x.clone().requires_grad_()
        expected = function(leaf, labels)
        if len(rows):
            expected = expected + 0.7 * function(leaf, labels, rows, row_labels)
        assert got[0].shape == ()
        # The rows stand in another order in the memory: equal to rounding.
        torch.testing.assert_close(got, (expected.detach(), *torch.autograd.grad(expected, leaf)))
        rows, row_labels = torch.cat([rows, x])[-memory_size:], torch.cat([row_labels, labels])[-memory_size:]
        assert memory.filled == len(rows)
        queue = torch.cat([memory.memory, memory.memory_labels[:, None]], dim=1)[: memory.filled]
        assert sorted(queue.tolist()) == sorted(torch.cat([rows, row_labels[:, None]], dim=1).tolist())


@by_loss
def test_an_empty_memory_adds_nothing(name):
    loss, function = pair(name)
    x, labels = next(stream(16))
    assert torch.equal(nn.CrossBatchMemory(loss, D)(x, labels), function(x, labels))


def test_no_anchor_meets_itself():
    """Rows of labels that never come again have no positive, neither in their batch nor in the memory."""
    memory = nn.CrossBatchMemory(nn.BatchHardTripletLoss(margin=5.0), D, memory_size=20)
    together = nn.CrossBatchMemory(nn.BatchContrastiveLoss(neg_margin=0.0), D, memory_size=20)
    for i in range(6):
        x, labels = torch.randn(8, D), torch.arange(8) + 8 * i
        for each in (memory, together):
            value, gradient = step(each, x, labels)
            assert value == 0 and not gradient.any()


def test_the_gradient_goes_to_the_batch_only():
    memory = nn.CrossBatchMemory(nn.BatchContrastiveLoss(neg_margin=3.0), D, memory_size=20)
    (first, labels), (second, others) = islice(stream(8), 2)
    first, second = first.requires_grad_(), second.requires_grad_()
    memory(first, labels)
    memory(second, others).backward()
    assert first.grad is None and second.grad.any()
    assert not memory.memory.requires_grad
    assert not list(memory.parameters())


@by_loss
def test_backward_after_later_calls(name):
    """They overwrite the memory; each loss keeps what it has seen."""
    together, apart = (nn.CrossBatchMemory(pair(name)[0], D, memory_size=10) for _ in range(2))
    batches = [(x.requires_grad_(), labels) for x, labels in islice(stream(8), 4)]
    losses = [together(x, labels) for x, labels in batches]
    gradients = torch.autograd.grad(sum(losses), [x for x, _ in batches])
    for (x, labels), value, gradient in zip(batches, losses, gradients, strict=True):
        expected = step(apart, x.detach(), labels)
        assert torch.equal(value, expected[0]) and torch.equal(gradient, expected[1])


# ---- state -------------------------------------------------------------------------------------------------


@by_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [0, 1, 5], ids=["empty", "part", "wrapped"])
def test_training_continues_in_the_same_bits(name, dtype, steps):
    batches = stream(8, dtype=dtype)
    memory = nn.CrossBatchMemory(pair(name)[0], D, memory_size=20).to(dtype)
    for x, labels in islice(batches, steps):
        memory(x, labels)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    restored = nn.CrossBatchMemory(pair(name)[0], D, memory_size=20).to(dtype)
    restored(*next(stream(3, seed=1, dtype=dtype)))  # is forgotten
    restored.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(memory)
    for x, labels in islice(batches, 4):
        expected = step(memory, x, labels)
        for other in (restored, copied):
            assert all(map(torch.equal, step(other, x, labels), expected))
            assert same_state(other, memory)


def test_reset_empties_it():
    memory = nn.CrossBatchMemory(nn.BatchAllTripletLoss(), D, memory_size=20)
    for x, labels in islice(stream(8), 4):
        memory(x, labels)
    memory.reset()
    assert memory.filled == 0
    assert same_state(memory, nn.CrossBatchMemory(nn.BatchAllTripletLoss(), D, memory_size=20))


def test_eval_mode_looks_and_leaves_all_as_it_is():
    memory = nn.CrossBatchMemory(nn.BatchHardTripletLoss(margin=2.0), D, memory_size=20)
    batches = stream(8)
    memory(*next(batches))
    before, batch = copy.deepcopy(memory), next(batches)
    value = memory.eval()(*batch)
    assert same_state(memory, before)
    assert torch.equal(value, memory.train()(*batch))
    assert memory.filled == 16


def test_a_nan_stays_until_it_is_overwritten():
    memory = nn.CrossBatchMemory(nn.BatchContrastiveLoss(), D, memory_size=16)
    batches = stream(8)
    x, labels = next(batches)
    x[3, 1] = torch.nan
    isnan = [memory(x, labels).isnan().item()]
    isnan += [memory(x, labels).isnan().item() for x, labels in islice(batches, 4)]
    assert isnan == [True, True, True, False, False]


# ---- dtypes ------------------------------------------------------------------------------------------------


def test_float64():
    memory = nn.CrossBatchMemory(nn.BatchAllTripletLoss(), D, memory_size=20).to(torch.float64)
    assert memory.memory.dtype == torch.float64 and memory.memory_labels.dtype == torch.int64
    (x, labels), (y, others) = islice(stream(8, dtype=torch.float64), 2)
    y = y + 1e-12
    memory(x, labels)
    expected = functional.batch_all_triplet_loss(y, others) + functional.batch_all_triplet_loss(
        y, others, x, labels
    )
    assert torch.equal(memory(y, others), expected)


@by_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kept_as", ["float32", "same"])
def test_half_embeddings_meet_the_memory_in_their_dtype(name, dtype, kept_as):
    loss, function = pair(name)
    memory = nn.CrossBatchMemory(loss, D, memory_size=20)
    if kept_as == "same":
        memory = memory.to(dtype)
    (x, labels), (y, others) = islice(stream(8, dtype=dtype), 2)
    memory(x, labels)
    got, gradient = step(memory, y, others)
    assert got.dtype == torch.float32 and gradient.dtype == dtype
    leaf = y.clone().requires_grad_()
    expected = function(leaf, others) + function(leaf, others, x, labels)
    assert torch.equal(got, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, leaf)[0])


def test_autocast():
    network = torch.nn.Linear(3, D)
    memory = nn.CrossBatchMemory(nn.BatchHardTripletLoss(margin=2.0), D, memory_size=20)
    inputs, labels = torch.randn(2, 8, 3), torch.arange(8) % 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (network(x) for x in inputs)
        assert second.dtype == torch.bfloat16
        memory(first, labels)
        loss = memory(second, labels)
    loss.backward()
    assert network.weight.grad.any()
    function = partial(functional.batch_hard_triplet_loss, margin=2.0)
    assert torch.equal(loss, function(second, labels) + function(second, labels, first.detach(), labels))


# ---- errors ------------------------------------------------------------------------------------------------

LOSS = nn.BatchAllTripletLoss()
EXPECTED_LOSS = 'loss must be a batch loss of deepsim_ext.nn without return_stats and reduction="none", got '


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        ((nn.TripletMarginLoss(), D), TypeError, EXPECTED_LOSS + "TripletMarginLoss"),
        ((functional.batch_all_triplet_loss, D), TypeError, EXPECTED_LOSS + "function"),
        ((nn.BatchHardTripletLoss(reduction="none"), D), ValueError,
         EXPECTED_LOSS + "BatchHardTripletLoss(positive='hard', negative='hard', margin=0.2, soft=False,"
         " distance='euclidean', reduction='none', return_stats=False)"),
        ((nn.BatchAllTripletLoss(return_stats=True), D), ValueError,
         EXPECTED_LOSS + "BatchAllTripletLoss(margin=0.2, distance='euclidean', reduction='mean_nonzero',"
         " return_stats=True)"),
        ((LOSS, 0), ValueError, "embedding_size must be an integer >= 1, got int 0"),
        ((LOSS, 2.0), TypeError, "embedding_size must be an integer >= 1, got float 2.0"),
        ((LOSS, D, -1), ValueError, "memory_size must be an integer >= 1, got int -1"),
        ((LOSS, D, True), TypeError, "memory_size must be an integer >= 1, got bool True"),
        ((LOSS, D, 8, -0.5), ValueError, "weight must be a finite number >= 0, got float -0.5"),
        ((LOSS, D, 8, "1"), TypeError, 'weight must be a finite number >= 0, got "1"'),
    ],
)  # fmt: skip
def test_options_are_checked_at_construction(args, kind, message):
    with pytest.raises(kind) as raised:
        nn.CrossBatchMemory(*args)
    assert type(raised.value) is kind and str(raised.value) == f"CrossBatchMemory: {message}"


X, LABELS = torch.zeros(4, D), torch.arange(4)


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        ((X[0], LABELS), ValueError,
         "embeddings must be float32, float64, bfloat16 or float16 of shape [N, D] with D >= 1,"
         " got float32 [5]"),
        ((X.long(), LABELS), TypeError,
         "embeddings must be float32, float64, bfloat16 or float16 of shape [N, D] with D >= 1,"
         " got int64 [4, 5]"),
        ((X[:, :3], LABELS), ValueError, "embeddings must be of shape [N, D]=[N, 5], got float32 [4, 3]"),
        ((X.to("meta"), LABELS), ValueError,
         "embeddings must be on cpu, where memory is, got float32 [4, 5] on meta"),
        ((X.double(), LABELS), TypeError,
         "embeddings must be of a dtype that a float32 memory holds exactly, got float64 [4, 5]"),
        ((X, LABELS[:3]), ValueError, "labels must be int64 of shape [N]=[4], got int64 [3]"),
        ((X, LABELS.float()), TypeError, "labels must be int64 of shape [N]=[4], got float32 [4]"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("filled", [0, 8])
def test_bad_input_leaves_the_memory_as_it_was(args, kind, message, filled):
    memory = nn.CrossBatchMemory(LOSS, D, memory_size=20)
    memory(*next(stream(filled)))
    before = copy.deepcopy(memory)
    with pytest.raises(kind) as raised:
        memory(*args)
    assert type(raised.value) is kind and str(raised.value) == f"CrossBatchMemory: {message}"
    assert same_state(memory, before)


@pytest.mark.parametrize("fails_with_references", [False, True])
def test_a_loss_that_fails_leaves_the_memory_as_it_was(monkeypatch, fails_with_references):
    memory = nn.CrossBatchMemory(nn.BatchAllTripletLoss(), D, memory_size=20)
    memory(*next(stream(8)))
    before = copy.deepcopy(memory)

    def failing(x, labels, ref=None, ref_labels=None):
        if fails_with_references and ref is None:
            return x.sum()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(memory.loss, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        memory(*next(stream(8)))
    assert same_state(memory, before)


def test_repr_names_the_options():
    memory = nn.CrossBatchMemory(nn.BatchAllTripletLoss(), 128, weight=2)
    options = "embedding_size=128, memory_size=1024, weight=2.0"
    assert repr(memory).startswith(f"CrossBatchMemory(\n  {options}\n  (loss): BatchAllTripletLoss(")
