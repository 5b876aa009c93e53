"""The same bits from run to run and for any number of threads."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepsim_ext import batch_hard_mine, batch_hard_triplet_loss, gram_matrix, style_loss

from .samples import DISTANCES, DTYPES, balanced_labels

ROOT = Path(__file__).resolve().parent.parent


def digest(*tensors: Tensor) -> list[str]:
    """A short hash of the bits of each tensor."""
    raw = (t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    return [hashlib.sha256(bits).hexdigest()[:16] for bits in raw]


def batch_hard_digests() -> Iterator[tuple[str, list[str]]]:
    """(case, digests of indices, loss and gradients)."""
    g = torch.Generator().manual_seed(30)
    sizes = ((5, 3), (33, 7), (250, 70), (1000, 33), (3000, 20))
    for dtype in DTYPES:
        for i, (n, d) in enumerate(sizes):
            x, ref = (
                torch.randn(n, d, generator=g).to(dtype),
                torch.randn(n // 2 + 3, d, generator=g).to(dtype),
            )
            labels, ref_labels = balanced_labels(n, 4, g), balanced_labels(len(ref), 2, g)
            ties = x[torch.randint(max(n // 20, 2), (n,), generator=g)]  # every row some twenty times
            distance, soft = DISTANCES[i % 3], bool(i % 2)
            cases = (("self", x, None, None), ("ties", ties, None, None), ("references", x, ref, ref_labels))
            for name, embeddings, *others in cases:
                sets = [t if t is None else t.clone() for t in (embeddings, labels, *others)]
                leaves = [t.requires_grad_() for t in sets if t is not None and t.is_floating_point()]
                mined = batch_hard_mine(*sets, distance=distance)
                loss = batch_hard_triplet_loss(*sets, margin=10.0, soft=soft, distance=distance)
                gradients = torch.autograd.grad(loss, leaves, torch.tensor(1000.0, dtype=loss.dtype))
                assert len(mined[0]) > 0
                assert name == "ties" or all(t.any() for t in gradients)
                yield f"{name} N={n} {dtype} {distance}", digest(*mined, loss, *gradients)


def gram_digests() -> Iterator[tuple[str, list[str]]]:
    """(case, digests of Gram matrix, style loss and gradients)."""
    g = torch.Generator().manual_seed(31)
    shapes = (
        ("picture", (1, 64, 200, 200)),
        ("1D", (1, 64, 40000)),
        ("few positions", (1, 200, 3000)),
        ("batch of pictures", (3, 24, 37, 41)),
        ("more channels than positions", (1, 512, 12, 12)),
        ("deep picture, where BLAS would cut the depth by threads", (1, 1024, 7, 7)),
    )
    for name, shape in shapes:
        for dtype in DTYPES:
            f = torch.randn(shape, generator=g).to(dtype)
            target = torch.rand(shape[1], shape[1], generator=g)
            target = target.to(torch.float64 if dtype is torch.float64 else torch.float32)
            for layout in (torch.contiguous_format, torch.channels_last)[: 2 if "picture" in name else 1]:
                leaves = f.clone(memory_format=layout).requires_grad_(), target.clone().requires_grad_()
                gram = gram_matrix(leaves[0])
                loss = style_loss(*leaves)
                scale = torch.tensor(2.0**20, dtype=loss.dtype)
                gradients = (
                    *torch.autograd.grad(loss, leaves, scale),
                    *torch.autograd.grad(
                        gram, leaves[0], torch.rand(gram.shape, generator=g).to(gram) * scale
                    ),
                )
                assert all(t.any() for t in gradients)
                yield f"{name} {dtype} {layout}", digest(gram, loss, *gradients)


FAMILIES = {"batch_hard": batch_hard_digests, "gram": gram_digests}


@functools.cache
def digests_alone(family: str) -> dict[str, list[str]]:
    """With one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return dict(FAMILIES[family]())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_for_any_number_of_threads(family, count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert dict(FAMILIES[family]()) == digests_alone(family)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_in_another_process(family):
    program = (
        "import json; from tests.test_determinism import FAMILIES; print(json.dumps(dict(FAMILIES[{!r}]())))"
    )
    process = subprocess.run(
        [sys.executable, "-c", program.format(family)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(process.stdout) == digests_alone(family)
