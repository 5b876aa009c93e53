"""Choice of pairs and triplets for the miners, in plain torch by chunks of anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.triplets import choose
from ._matrix import distance_matrix
from ._pairs import Batch

Range = tuple[float, float] | None


def pick(
    batch: Batch,
    positive: str,
    negative: str,
    *,
    distance: str,
    similarity: bool,
    positive_range: Range,
    negative_range: Range,
) -> tuple[Tensor, Tensor]:
    """(positives, negatives): a row each for every anchor, int64 [N], by the strategies of `choose`.

    -1 where there is none; the one may be there without the other. Ranges are of distances or, when
    `similarity`, of 1 - distance, ends included.
    """
    batch = batch.in_compute_dtype()
    parts: list[tuple[Tensor, Tensor]] = []
    for anchors in batch.chunks(len(batch.ref_embeddings)):
        d = distance_matrix(batch.embeddings[anchors], batch.ref_embeddings, distance)
        positives, negatives = batch.masks(anchors)
        measured = 1 - d if similarity else d
        positives &= _within(measured, positive_range)
        negatives &= _within(measured, negative_range)
        parts.append(choose(d, positives, negatives, positive, negative))
    positives, negatives = (torch.cat(part) for part in zip(*parts, strict=True))
    return positives, negatives


def triplets_within(
    batch: Batch, kind: str, *, margin: float, distance: str
) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets (anchors, positives, negatives) whose d_an - d_ap is of a `kind`, in row order.

    "all": <= margin; "hard": also <= 0; "semihard": also > 0; "easy": > margin.
    """
    batch = batch.in_compute_dtype()
    parts: list[tuple[Tensor, ...]] = [(batch.labels.new_empty(0),) * 3]
    for anchors in batch.chunks(len(batch.ref_embeddings) * batch.most_positives()):
        d = distance_matrix(batch.embeddings[anchors], batch.ref_embeddings, distance)
        positive, negative = batch.masks(anchors)
        a, p = positive.nonzero(as_tuple=True)
        gap = d[a] - d[a, p, None]
        chosen = gap > margin if kind == "easy" else gap <= margin
        if kind == "hard":
            chosen &= gap <= 0
        elif kind == "semihard":
            chosen &= gap > 0
        pair, n = (chosen & negative[a]).nonzero(as_tuple=True)
        parts.append((anchors[a[pair]], p[pair], n))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _within(values: Tensor, limits: Range) -> Tensor | bool:
    return True if limits is None else (values >= limits[0]) & (values <= limits[1])
