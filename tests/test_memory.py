"""Peak memory of forward and backward, each in a process of its own (see benchmarks/memory.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.memory import peak_in_subprocess
from deepsim_ext import (
    batch_all_triplet_loss,
    batch_contrastive_loss,
    batch_hard_triplet_loss,
    batch_semi_hard_triplet_loss,
    gram_matrix,
    style_loss,
)

from .samples import balanced_labels

MIB = 2**20


def batch_hard_probe(
    n: str, d: str, dtype: str, form: str
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The call to measure, and the same on few rows to warm up."""

    def step(rows: int) -> Callable[[], object]:
        x = torch.randn(rows, int(d)).to(getattr(torch, dtype)).requires_grad_()
        labels = balanced_labels(rows, 4)
        others = (x.detach().clone().requires_grad_(), labels.clone()) if form == "references" else ()
        strategies = {"positive": "easy", "negative": "semihard"} if form == "strategies" else {}
        return lambda: batch_hard_triplet_loss(x, labels, *others, **strategies).backward()

    return step(int(n)), step(64)


ALL_PAIRS = {
    "semi_hard": batch_semi_hard_triplet_loss,
    "batch_all": batch_all_triplet_loss,
    "contrastive": batch_contrastive_loss,
}


def two_classes_probe(loss: str, n: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The call to measure, on rows of two classes, and the same on few rows to warm up."""

    def step(rows: int) -> Callable[[], object]:
        x, labels = torch.randn(rows, 8, requires_grad=True), torch.arange(rows) % 2
        return lambda: ALL_PAIRS[loss](x, labels).backward()

    return step(int(n)), step(64)


def style_probe(loss: str, channels: str, side: str, dtype: str, layout: str):
    """The call to measure, and the same on a small picture to warm up."""
    memory_format = getattr(torch, layout)

    def step(size: int) -> Callable[[], object]:
        f = torch.randn(1, int(channels), size, size).to(getattr(torch, dtype), memory_format=memory_format)
        f.requires_grad_()
        target = torch.zeros(1, int(channels), int(channels))
        if loss == "style_loss":
            return lambda: style_loss(f, target).backward()
        return lambda: gram_matrix(f).backward(target)

    return step(int(side)), step(8)


@pytest.mark.parametrize("form", ["self", "references", "strategies"])
@pytest.mark.parametrize(
    ("n", "d", "dtype"),
    [(8192, 128, "float32"), (8192, 128, "bfloat16"), (32768, 16, "float32")],
    ids=["float32", "bfloat16", "many"],
)
def test_batch_hard_needs_no_square_matrix(n, d, dtype, form):
    """At most 64 N bytes + 32 MiB beyond the gradient and one packed copy, float32 for bfloat16 too."""
    sets = 2 if form == "references" else 1
    gradient, packed = (sets * n * d * size for size in (getattr(torch, dtype).itemsize, 4))
    peak = peak_in_subprocess("tests.test_memory:batch_hard_probe", n, d, dtype, form)
    assert gradient <= peak <= gradient + packed + sets * 64 * n + 32 * MIB


@pytest.mark.parametrize("loss", ALL_PAIRS)
def test_classes_of_half_the_batch_need_no_square_matrix(loss):
    """32 bytes of each positive that csrc/cpu/positive_lists.h lists at a time, and 64 N bytes + 32 MiB."""
    n = 6144
    peak = peak_in_subprocess("tests.test_memory:two_classes_probe", loss, n)
    assert 4 * 8 * n <= peak <= 32 * 2**21 + 64 * n + 32 * MIB < 4 * n**2


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize(
    ("side", "dtype"), [(256, "float32"), (512, "bfloat16")], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("loss", ["style_loss", "gram_matrix"])
def test_style_needs_no_copy_of_the_features(loss, side, dtype, layout):
    """Less than the features' size beyond their gradient; widened bfloat16 features would be twice that."""
    features = 64 * side * side * getattr(torch, dtype).itemsize
    peak = peak_in_subprocess("tests.test_memory:style_probe", loss, 64, side, dtype, layout)
    assert features <= peak <= 2 * features
