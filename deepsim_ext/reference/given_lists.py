"""Anchors that bring the distances of their positives as lists, against a block of rows, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import compute_dtype
from .distances import pairwise

WORKSPACE = 2**20  # distances and elements of lists held at a time; those of one anchor are held in any case


class Stripe(NamedTuple):
    """R anchors, their lists of up to L positives, and the block's M rows, with one more that is nobody's."""

    rows: slice  # which anchors
    distances: Tensor  # [R, M + 1]; inf where the row is not a negative
    ascending: Tensor  # [R, M + 1]: the same in order, equal ones by ascending index
    order: Tensor  # int64 [R, M + 1]: which rows they are of
    filled: Tensor  # bool [R, L]: what of the lists below is an element
    elements: Tensor  # int64 [R, L]: its place among the positives
    positives: Tensor  # [R, L]; -inf where there is none


def stripes(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor,
    ref_labels: Tensor,
    begin: Tensor,
    positives: Tensor,
    distance: str,
) -> Iterator[Stripe]:
    """All anchors; one sync with the host, to ask for the length of the longest list."""
    x, refs = (t.to(compute_dtype(t)) for t in (embeddings, ref_embeddings))
    lengths = begin.diff()
    slots = torch.arange(int(lengths.max()) if len(x) else 0, device=x.device)
    size = max(1, WORKSPACE // (len(refs) + 1 + len(slots)))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        negative = labels[rows, None] != ref_labels
        distances = torch.where(negative, pairwise(x[rows], refs, distance), torch.inf)
        distances = torch.nn.functional.pad(distances, (0, 1), value=torch.inf)
        filled = slots < lengths[rows, None]
        elements = torch.where(filled, begin[:-1][rows, None] + slots, 0)
        lists = torch.where(filled, positives[elements], -torch.inf)
        yield Stripe(rows, distances, *distances.sort(dim=1, stable=True), filled, elements, lists)


def comparable(embeddings: Tensor, ref_embeddings: Tensor, distance: str) -> Tensor:
    """bool scalar: no NaN or inf in the rows, and none too long for its square where that matters."""
    finite = True
    for x in (embeddings, ref_embeddings):
        x = x.to(compute_dtype(x))
        longest = torch.inf if distance == "cosine" else torch.finfo(x.dtype).max ** 0.5 / 4
        finite = finite & (x.isfinite().all() & (torch.linalg.vector_norm(x.double(), dim=1) < longest).all())
    return finite
