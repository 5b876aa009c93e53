"""Losses and sampling over the batches of all ranks of a torch.distributed process group."""

from __future__ import annotations

from .loss import DistributedLoss
from .sampler import ClassBalancedBatchSampler

__all__ = ["ClassBalancedBatchSampler", "DistributedLoss"]
