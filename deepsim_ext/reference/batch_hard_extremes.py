"""The hardest pairs of a block of rows, for the rows of both sides, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import compute_dtype
from .distances import pairwise
from .given_lists import WORKSPACE, comparable


@torch.no_grad()
def batch_hard_extremes(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    center: Tensor,
    distance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The farthest positive and the nearest negative of every row, and of every row of a reference set.

    Arguments and result are those of `deepsim_ext.batch_hard_extremes.batch_hard_extremes`; memory beyond
    them is 2^20 distances and what comes with them. Differences need no `center` and lose no digits: half
    norms are 0.
    """
    dtype = compute_dtype(embeddings)
    x, self_form = embeddings.to(dtype), ref_embeddings is None
    refs, other_labels = (x, labels) if self_form else (ref_embeddings.to(dtype), ref_labels)
    sides = [_nothing_found(x), _nothing_found(x[:0] if self_form else refs)]
    size = max(1, WORKSPACE // max(1, len(refs)))
    for start in range(0, len(x) if len(refs) else 0, size):
        rows = torch.arange(start, min(start + size, len(x)), device=x.device)
        d = pairwise(x[rows], refs, "cosine" if distance == "cosine" else "euclidean")
        half_squares = d if distance == "cosine" else d.square() / 2
        same = labels[rows, None] == other_labels
        positive, negative = same, ~same
        if self_form:
            positive = same & (rows[:, None] != torch.arange(len(x), device=x.device))
        # As larger is better; only what is there is worth more than nothing.
        values = torch.stack([half_squares, -half_squares])
        values = values.where(torch.stack([positive, negative]), -torch.inf)
        best, index = sides[0]
        best[:, rows], index[:, rows] = _largest(values, dim=2)
        if not self_form:
            best, index = sides[1]
            found, row = _largest(values, dim=1)
            better = found > best  # of equals the first, which came before
            best[better], index[better] = found[better], row[better] + start
    right = comparable(embeddings, embeddings if self_form else ref_embeddings, distance)
    results = []
    for best, index in sides:
        found = right & ~best.isinf()
        half_squares = torch.stack([best[0], -best[1]])
        results += [torch.where(right, half_squares, torch.nan), torch.where(found, index, -1).int()]
    return *results[:2], x.new_zeros(len(x)), *results[2:]


def _largest(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of equals the first, which `max` does not promise on every device."""
    best = values.amax(dim)
    return best, (values == best.unsqueeze(dim)).int().argmax(dim)


def _nothing_found(x: Tensor) -> tuple[Tensor, Tensor]:
    """Best values and indices [2, n]."""
    best = x.new_full((2, len(x)), -torch.inf)
    return best, torch.zeros_like(best, dtype=torch.int64)
