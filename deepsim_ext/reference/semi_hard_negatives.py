"""Semi-hard negatives of a block of rows, for anchors that bring the distances of their positives."""

from __future__ import annotations

import torch
from torch import Tensor

from .given_lists import comparable, stripes


@torch.no_grad()
def semi_hard_negatives(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor,
    ref_labels: Tensor,
    begin: Tensor,
    positives: Tensor,
    center: Tensor | None,
    distance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The nearest negative that is farther, for every element of the lists, and every anchor's farthest.

    Arguments and result are those of `deepsim_ext.semi_hard_negatives.semi_hard_negatives`; memory beyond
    them is 2^20 distances and what comes with them. Differences need no `center`.
    """
    nearest = torch.full_like(positives, torch.inf)
    nearest_index = torch.full_like(positives, -1, dtype=torch.int32)
    farthest = positives.new_full((len(embeddings),), -torch.inf)
    farthest_index = torch.full_like(farthest, -1, dtype=torch.int32)
    for s in stripes(embeddings, labels, ref_embeddings, ref_labels, begin, positives, distance):
        row = torch.where(s.ascending.isinf(), -1, s.order).int()
        last = s.order.shape[1] - 1
        farther = torch.searchsorted(s.ascending, s.positives, right=True).clamp(max=last)
        elements = s.elements[s.filled]
        nearest[elements] = s.ascending.gather(1, farther)[s.filled]
        nearest_index[elements] = row.gather(1, farther)[s.filled]
        # The largest, of equals the first.
        largest = torch.where(s.distances.isinf(), -torch.inf, s.distances).max(dim=1)
        farthest[s.rows] = largest.values
        first = (s.distances == largest.values[:, None]).int().argmax(dim=1)
        farthest_index[s.rows] = torch.where(largest.values.isinf(), -1, first).int()
    right = comparable(embeddings, ref_embeddings, distance) & ~positives.isnan().any()
    return (
        torch.where(right, nearest, torch.nan),
        torch.where(right, nearest_index, -1),
        torch.where(right, farthest, torch.nan),
        torch.where(right, farthest_index, -1),
    )
