"""Classes of so many rows that the lists of their positives are held a stripe of anchors at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepsim_ext import (
    batch_all_triplet_loss,
    batch_contrastive_loss,
    batch_hard_mine,
    batch_semi_hard_triplet_loss,
    reference,
)

MOST_LISTED = 2**21  # kMostListed of csrc/cpu/positive_lists.h


def batch(form: str, dtype: torch.dtype) -> list[Tensor]:
    """Embeddings and labels of two classes, of a small one, and of one row; with references or without."""
    g = torch.Generator().manual_seed(3)

    def side(sizes: list[int]) -> list[Tensor]:
        labels = torch.repeat_interleave(torch.tensor([7, 2, 5, 1]), torch.tensor(sizes))
        labels = labels[torch.randperm(len(labels), generator=g)]
        x = torch.randn(len(labels), 3, generator=g, dtype=torch.float64) + labels[:, None] * 0.3
        return [x.to(dtype), labels]

    if form == "self":
        return side([1150, 1080, 30, 1])
    return side([230, 260, 9, 1]) + side([6000, 5000, 40, 0])


def distances(x: Tensor, ref: Tensor) -> Tensor:
    return (x[:, None] - ref[None]).square().sum(dim=2).clamp(min=1e-300).sqrt()


def by_label(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Who is a positive and who a negative of whom, [N, M]."""
    same = labels[:, None] == (labels if ref_labels is None else ref_labels)[None]
    return same & ~torch.eye(len(labels), dtype=torch.bool) if ref_labels is None else same, ~same


def batch_all(
    x: Tensor, labels: Tensor, ref: Tensor | None = None, ref_labels: Tensor | None = None, *, margin: float
) -> tuple[Tensor, int]:
    """The sum of all triplets' losses and how many are > 0, without a tensor of all triplets."""
    d = distances(x, x if ref is None else ref)
    positive, negative = by_label(labels, ref_labels)
    ascending = torch.where(negative, d, torch.inf).sort(dim=1).values
    limits = torch.where(positive, d + margin, 0)
    count = torch.searchsorted(ascending, limits)  # active negatives; none for what is no positive
    sums = torch.where(ascending.isinf(), 0, ascending).cumsum(dim=1)
    sums = torch.cat([sums.new_zeros(len(x), 1), sums], dim=1)
    return (limits * count - sums.gather(1, count)).sum(), int(count.sum())


forms = pytest.mark.parametrize("form", ["self", "references"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_floating_point()]


def exactly(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double().clone().requires_grad_() if t.is_floating_point() else t for t in tensors]


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    error = (a.detach().double() - b.detach().double()).norm()
    return bool(error <= (1e-10 if dtype is torch.float64 else 2e-5) * b.detach().double().norm())


@forms
def test_several_stripes_are_needed(form):
    labels, *others = (t for t in batch(form, torch.float32) if not t.is_floating_point())
    positive, _ = by_label(labels, *(others or [None]))
    assert positive.sum() > 1.1 * MOST_LISTED


@forms
@dtypes
def test_batch_all(form, dtype):
    tensors = batch(form, dtype)
    exact = exactly(tensors)
    loss, active = batch_all(*exact, margin=0.4)
    for t in leaves(tensors):
        t.requires_grad_()
    got = batch_all_triplet_loss(*tensors, margin=0.4, reduction="mean_nonzero", return_stats=True)
    got.loss.backward()
    (loss / active).backward()
    assert abs(got.active_triplets - active) <= (0 if dtype is torch.float64 else 1e-5 * active)
    assert close(got.loss, loss / active, dtype)
    assert all(close(a.grad, b.grad, dtype) for a, b in zip(leaves(tensors), leaves(exact), strict=True))


@forms
@dtypes
@pytest.mark.parametrize("loss", ["semi_hard", "contrastive"])
def test_against_the_reference(loss, form, dtype):
    function, options = {
        "semi_hard": (batch_semi_hard_triplet_loss, {"margin": 0.1}),
        "contrastive": (batch_contrastive_loss, {"pos_margin": 0.4, "neg_margin": 1.5, "squared": True}),
    }[loss]
    tensors = batch(form, dtype)
    exact = exactly(tensors)
    for t in leaves(tensors):
        t.requires_grad_()
    got = function(*tensors, reduction="mean_nonzero", return_stats=True, **options)
    twin = getattr(reference, function.__name__)
    wanted = twin(*exact, reduction="mean_nonzero", return_stats=True, **options)
    got.loss.backward()
    wanted.loss.backward()
    for field, a, b in zip(got._fields, got, wanted, strict=True):
        assert close(a, b, dtype), field
    for a, b in zip(leaves(tensors), leaves(exact), strict=True):
        if loss == "semi_hard" and dtype is torch.float32:
            # Some triplets are others, where two distances differ by less than they are rounded.
            assert (a.grad - b.grad).norm() <= 1e-2 * b.grad.norm()
        else:
            assert close(a.grad, b.grad, dtype)


@forms
@pytest.mark.parametrize(
    "loss", [batch_semi_hard_triplet_loss, batch_all_triplet_loss, batch_contrastive_loss]
)
def test_the_same_bits_for_any_number_of_threads(loss, form):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            tensors = batch(form, torch.float32)
            for t in leaves(tensors):
                t.requires_grad_()
            value = loss(*tensors)
            value.backward()
            found.append([value.detach(), *(t.grad for t in leaves(tensors))])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@forms
@pytest.mark.parametrize("negative", ["hard", "semihard"])
def test_easy_positives(form, negative):
    tensors = batch(form, torch.float64)
    options = {"positive": "easy", "negative": negative}
    found = batch_hard_mine(*tensors, **options), reference.batch_hard_mine(*tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
