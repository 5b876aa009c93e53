"""The ring with ops in plain torch, as on CUDA, which has no kernels for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepsim_ext import nn, reference
from deepsim_ext.distributed import DistributedLoss

from .ranks import run_ranks
from .test_losses import draw, losses, offsets

OPS = (
    "batch_all_negatives",
    "positive_distances",
    "semi_hard_negatives",
)
SIZES = (31, 7, 1)
DATA = ("spread", "duplicates")


def cases(distance: str) -> list[nn.embeddings.BatchLoss]:
    """All but the contrastive loss, whose op has kernels for every device."""
    return [loss for loss in losses(distance) if not isinstance(loss, nn.BatchContrastiveLoss)]


def on_a_rank(rank: int, distance: str) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Loss and gradient of every case, and how many of the ops were called."""
    called = set()
    library = torch.library.Library("deepsim_ext", "IMPL")

    def counted(name):
        function = getattr(reference, name)
        return lambda *args: (called.add(name), function(*args))[1]

    for name in OPS:
        library.impl(name, counted(name), "CPU", allow_override=True)
    ends, found = offsets(SIZES), []
    for data in DATA:
        x, labels = draw(data, ends[-1], torch.float64)
        mine = slice(ends[rank], ends[rank + 1])
        for loss in cases(distance):
            own = x[mine].clone().requires_grad_()
            value = DistributedLoss(loss, mode="ring", averaged_gradients=False)(own, labels[mine]).loss
            value.backward()
            found.append((value.detach(), own.grad))
    return found, len(called)


@pytest.mark.filterwarnings("ignore:.*verriding")
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_as_one_process(distance: str) -> None:
    found, called = zip(*run_ranks(3, on_a_rank, distance), strict=True)
    assert called == (len(OPS),) * 3
    every = [(data, loss) for data in DATA for loss in cases(distance)]
    for (data, loss), *of_ranks in zip(every, *found, strict=True):
        x, labels = draw(data, sum(SIZES), torch.float64)
        x.requires_grad_()
        right = loss(x, labels).loss
        right.backward()
        values, grads = zip(*of_ranks, strict=True)
        for value in values:
            torch.testing.assert_close(value, right.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat(grads), x.grad, rtol=1e-12, atol=1e-12)
