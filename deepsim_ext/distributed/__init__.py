"""Losses and mining over the batches of all ranks of a torch.distributed process group."""

from __future__ import annotations

from .loss import DistributedLoss

__all__ = ["DistributedLoss"]
