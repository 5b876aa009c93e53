"""Losses, mining, sampling and search over the rows of all ranks of a torch.distributed process group."""

from __future__ import annotations

from .evaluation import retrieval_metrics
from .loss import DistributedLoss
from .mining import batch_hard_mine
from .neighbors import nearest_neighbors
from .sampler import ClassBalancedBatchSampler

__all__ = [
    "ClassBalancedBatchSampler",
    "DistributedLoss",
    "batch_hard_mine",
    "nearest_neighbors",
    "retrieval_metrics",
]
