"""Choice of pairs and triplets for the miners, in plain torch by chunks of anchors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.distances import pairwise
from ._pairs import Batch

Range = tuple[float, float] | None


class Picked(NamedTuple):
    """One row per anchor."""

    indices: Tensor  # int64 [N]
    found: Tensor  # bool [N]; without it an index means nothing


def pick(
    batch: Batch,
    positives: str,
    negatives: str,
    *,
    distance: str,
    similarity: bool,
    positive_range: Range = None,
    negative_range: Range = None,
) -> tuple[Picked, Picked]:
    """A positive and a negative of every anchor.

    Strategies: a "hard" positive is the farthest and a "hard" negative the nearest, "easy" is the reverse;
    "semihard", chosen after the other of the two, is the hardest that leaves the negative farther than the
    positive. Ranges are of distances or, when `similarity`, of 1 - distance, ends included.
    """
    batch = batch.in_compute_dtype()
    parts: list[tuple[Tensor, ...]] = []
    for anchors in batch.chunks(len(batch.ref_embeddings)):
        d = pairwise(batch.embeddings[anchors], batch.ref_embeddings, distance)
        positive, negative = batch.masks(anchors)
        measured = 1 - d if similarity else d
        positive &= _within(measured, positive_range)
        negative &= _within(measured, negative_range)
        if positives == "semihard":
            n, d_n, has_n = _extreme(d, negative, largest=negatives == "easy")
            p, _, has_p = _extreme(d, positive & (d < d_n), largest=True)
        else:
            p, d_p, has_p = _extreme(d, positive, largest=positives != "easy")
            if negatives == "semihard":
                negative = negative & (d > d_p)
            n, _, has_n = _extreme(d, negative, largest=negatives == "easy")
        parts.append((p, has_p, n, has_n))
    p, has_p, n, has_n = (torch.cat(part) for part in zip(*parts, strict=True))
    return Picked(p, has_p), Picked(n, has_n)


def triplets_within(
    batch: Batch, kind: str, *, margin: float, distance: str
) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets (anchors, positives, negatives) whose d_an - d_ap is of a `kind`, in row order.

    "all": <= margin; "hard": also <= 0; "semihard": also > 0; "easy": > margin.
    """
    batch = batch.in_compute_dtype()
    parts: list[tuple[Tensor, ...]] = [(batch.labels.new_empty(0),) * 3]
    for anchors in batch.chunks(len(batch.ref_embeddings) * batch.most_positives()):
        d = pairwise(batch.embeddings[anchors], batch.ref_embeddings, distance)
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


def _extreme(d: Tensor, among: Tensor, *, largest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Index [R], distance [R, 1] and existence [R] of each row's largest or smallest entry `among` some."""
    if d.shape[1] == 0:
        nothing = d.new_zeros(len(d))
        return nothing.long(), nothing[:, None], nothing.bool()
    if largest:
        values, indices = d.masked_fill(~among, -torch.inf).max(dim=1)
    else:
        values, indices = d.masked_fill(~among, torch.inf).min(dim=1)
    return indices, values[:, None], among.any(dim=1)
