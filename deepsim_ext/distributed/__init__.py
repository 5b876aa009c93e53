"""Losses, mining and sampling over the batches of all ranks of a torch.distributed process group."""

from __future__ import annotations

from .loss import DistributedLoss
from .mining import batch_hard_mine
from .sampler import ClassBalancedBatchSampler

__all__ = ["ClassBalancedBatchSampler", "DistributedLoss", "batch_hard_mine"]
