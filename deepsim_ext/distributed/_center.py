"""What tiles shift all rows by: the same for every rank, so that a pair has the same distance on any of them.

The mean of all rows, rounded as the ops do for a batch of their own (csrc/cpu/packed_pairs.cpp), so that
tiles choose the same pairs for any number of ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.distances import unit_rows, zero_rows
from ._batches import Batches, add_up

SAMPLED_PAIRS = 16  # of rows, evenly spread, whose distances tell how far apart rows are
ROWS_AT_A_TIME = 4096


def common_center(x: Tensor, batches: Batches, distance: str) -> Tensor:
    """float64 [D]: the mean of all ranks' rows [n, D], or of their directions for cosine distance."""
    count, cosine = batches.offsets[-1], distance == "cosine"
    step = max(1, count // (SAMPLED_PAIRS + 1))
    pairs = max(0, min(count - 1, SAMPLED_PAIRS))
    sampled = [i * step for i in range(pairs + 1)]
    here = batches.rows(batches.rank)
    # One exchange for all: the sum of the rows, how many are zero, the sampled rows.
    facts = x.new_zeros(2 + len(sampled), x.shape[1], dtype=torch.float64)
    for rows in x.split(ROWS_AT_A_TIME):
        rows = rows.double()
        facts[0] += (unit_rows(rows) if cosine else rows).sum(dim=0)
        facts[1] += zero_rows(rows).sum()
    for k, row in enumerate(sampled):
        if here.start <= row < here.stop:
            facts[2 + k] = x[row - here.start]
    mean, zero, *rows = add_up(facts, batches)
    mean = mean / max(1, count)
    if cosine:
        # Rows that have no direction are at distance 1 from all others, as tiles see it without a shift.
        return torch.where(zero > 0, 0.0, mean)
    squares = sum(float((a - b).square().sum()) for a, b in zip(rows, rows[1:], strict=False))
    spread = math.sqrt(squares / (2 * max(1, pairs) * x.shape[1]))
    if not 0 < spread < math.inf:
        return mean
    grid = 2.0 ** (math.floor(math.log2(spread)) - 2)
    return torch.round(mean / grid) * grid
