"""Who shares a label with whom, over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from ._batches import Batches


def positive_pairs(batches: Batches) -> tuple[Tensor, Tensor]:
    """All pairs of a row of this rank and another of its label: rows of this rank, and global indices.

    int64 [P] both; ascending by row, then by index. No row is paired with itself.
    """
    labels, order = batches.labels.sort(stable=True)
    own = batches.labels[batches.rows(batches.rank)]
    begin = torch.searchsorted(labels, own)
    count = torch.searchsorted(labels, own, right=True) - begin
    mine = torch.repeat_interleave(torch.arange(len(own), device=own.device), count)
    within = torch.arange(len(mine), device=own.device) - (count.cumsum(0) - count)[mine]
    others = order[begin[mine] + within]
    another = others != mine + batches.offset
    return mine[another], others[another]
