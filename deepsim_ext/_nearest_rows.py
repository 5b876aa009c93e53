"""Nearest neighbours of any number, in bounded memory, with a rule for ties that holds at the last place too.

`nearest_neighbors` chooses by tiles, where two rows at the same distance may differ in the last digit, and
finds at most 1024. Here a few more rows are looked at than asked for, and all where ties or k want it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._checks.rows import MAX_NEIGHBORS
from ._checks.texts import error
from .nearest_neighbors import nearest_neighbors
from .reference.distances import pairwise
from .results import NearestNeighbors

WORKSPACE = 2**20  # distances held at a time, beside the result; those of one query are held in any case
EXTRA, DEEPER = 8, 4  # rows looked at beyond k; factor by which there are more if all of those are tied
LONGEST = {torch.float32: 1e18, torch.float64: 1e152}  # rows beyond which squared distances could overflow


def check_comparable(function: str, argument: str, x: Tensor) -> None:
    """Every row of x, float32 or float64, has a distance from every other: finite and not too long."""
    longest = LONGEST[x.dtype]
    if not (torch.linalg.vector_norm(x, dim=1) < longest).all():  # NaN fails too
        got = "a longer one" if x.isfinite().all() else "a NaN or inf"
        raise error(ValueError, function, argument, f"finite, with rows shorter than {longest:g}", got)


def nearest_rows(queries: Tensor, gallery: Tensor, k: int, *, distance: str) -> NearestNeighbors:
    """The k nearest rows of `gallery`, 1 <= k <= G, for every query; equal distances by ascending index.

    queries [Q, D] and gallery [G, D] of one dtype have passed `check_comparable`. Memory is O(Q k + G D).
    """
    return _nearest(queries, gallery, k, min(k + EXTRA, len(gallery)), distance)


def stripes(queries: Tensor, gallery: Tensor, *, distance: str) -> Iterator[tuple[slice, Tensor]]:
    """All distances, a few queries at a time: which queries, and [those, G]."""
    size = max(1, WORKSPACE // max(len(gallery), 1))
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        yield rows, pairwise(queries[rows], gallery, distance)


def _nearest(queries: Tensor, gallery: Tensor, k: int, take: int, distance: str) -> NearestNeighbors:
    """By looking at the `take` >= k nearest rows, and at more where the last is as near as the k-th."""
    distances = queries.new_empty(len(queries), k)
    indices = torch.empty_like(distances, dtype=torch.int64)
    if take > MAX_NEIGHBORS:
        for rows, of_all in stripes(queries, gallery, distance=distance):
            in_order, index = of_all.sort(dim=1, stable=True)
            distances[rows], indices[rows] = in_order[:, :k], index[:, :k]
        return NearestNeighbors(distances, indices)
    size = WORKSPACE // take
    for start in range(0, len(queries), size):
        rows = slice(start, start + size)
        # A slice is a tensor of its own: given the gallery itself, each query would not find itself.
        found = nearest_neighbors(queries[rows], gallery, take, distance=distance)
        distances[rows], indices[rows] = found.distances[:, :k], found.indices[:, :k]
        tied = (found.distances[:, k - 1] == found.distances[:, -1]).nonzero()[:, 0] + start
        if take < len(gallery) and len(tied):
            deeper = min(DEEPER * take, len(gallery))
            distances[tied], indices[tied] = _nearest(queries[tied], gallery, k, deeper, distance)
    return NearestNeighbors(distances, indices)
