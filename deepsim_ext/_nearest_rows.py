"""Nearest neighbours of any number, in bounded memory.

Every distance is a direct difference of two rows, the same to the bit whatever other rows there are, and
equal distances come by ascending index: so a gallery can be searched in parts, and what was found in them
merged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ._checks.rows import MAX_NEIGHBORS
from ._checks.texts import error
from .nearest_neighbors import nearest_neighbors
from .pair_distances import pair_distances
from .results import NearestNeighbors

WORKSPACE = 2**20  # distances held at a time, beside the result; those of one query are held in any case
TILE = 2**19  # pairs compared at a time, which takes up to some 70 bytes for each
MERGED = 2**17  # neighbours sorted at a time, which takes some 50 bytes for each
LONGEST = {torch.float32: 1e18, torch.float64: 1e152}  # rows beyond which squared distances could overflow


def comparable(x: Tensor) -> Tensor:
    """bool [N]: rows of x, float32 or float64, that have a distance from any other: finite, not too long."""
    return torch.linalg.vector_norm(x, dim=1) < LONGEST[x.dtype]  # NaN is not


def check_comparable(function: str, argument: str, x: Tensor, first: int | None = None) -> None:
    """ValueError unless all rows are `comparable`; it names the row if the number of the first is given."""
    right = comparable(x)
    if not right.all():
        got = "a longer one" if x.isfinite().all() else "a NaN or inf"
        if first is not None:
            got += f" in row {first + int(right.int().argmin())}"
        expected = f"finite, with rows shorter than {LONGEST[x.dtype]:g}"
        raise error(ValueError, function, argument, expected, got)


def nearest_rows(queries: Tensor, gallery: Tensor, k: int, *, distance: str) -> NearestNeighbors:
    """The k nearest rows of `gallery`, 1 <= k <= G, for every query; equal distances by ascending index.

    queries [Q, D] and gallery [G, D] of one dtype are `comparable`. Memory is O(Q k + G D).
    """
    distances = queries.new_empty(len(queries), k)
    indices = torch.empty_like(distances, dtype=torch.int64)
    if k <= MAX_NEIGHBORS:
        for rows in _parts(len(queries), WORKSPACE // k):
            # A slice is a tensor of its own: given the gallery itself, each query would not find itself.
            distances[rows], indices[rows] = nearest_neighbors(queries[rows], gallery, k, distance=distance)
    else:
        for rows, of_all in stripes(queries, gallery, distance=distance):
            in_order, index = of_all.sort(dim=1, stable=True)
            distances[rows], indices[rows] = in_order[:, :k], index[:, :k]
    return NearestNeighbors(distances, indices)


def no_neighbors(queries: Tensor) -> NearestNeighbors:
    """[Q, 0], to merge others with."""
    return NearestNeighbors(queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0).long())


def merge(k: int, *found: NearestNeighbors) -> NearestNeighbors:
    """The k nearest of all that were found, or all if they are fewer; equal distances by ascending index."""
    distances, indices = zip(*found, strict=True)
    queries, columns = len(distances[0]), sum(d.shape[1] for d in distances)
    merged = []
    for rows in _parts(max(queries, 1), max(1, MERGED // max(columns, 1))):
        index, order = torch.cat([i[rows] for i in indices], dim=1).sort(dim=1)
        near, ahead = torch.cat([d[rows] for d in distances], dim=1).gather(1, order).sort(dim=1, stable=True)
        merged.append((near[:, :k], index.gather(1, ahead[:, :k])))
    return NearestNeighbors(*map(torch.cat, zip(*merged, strict=True)))


def stripes(queries: Tensor, gallery: Tensor, *, distance: str) -> Iterator[tuple[slice, Tensor]]:
    """All distances, a few queries at a time: which queries, and [those, G]."""
    for rows in _parts(len(queries), max(1, WORKSPACE // max(len(gallery), 1))):
        part = queries[rows]
        blocks = (gallery[columns] for columns in _parts(len(gallery), MAX_NEIGHBORS))
        yield rows, torch.cat([_all_distances(part, block, distance) for block in blocks], dim=1)


def tiles(queries: int, gallery: int) -> Iterator[tuple[slice, slice]]:
    """All pairs, TILE at a time: which queries, and which rows of the gallery."""
    return itertools.product(_parts(queries, max(1, TILE // MAX_NEIGHBORS)), _parts(gallery, MAX_NEIGHBORS))


def pairs_of_tile(
    queries: Tensor, gallery: Tensor, rows: Tensor, columns: Tensor, *, distance: str
) -> Tensor:
    """[P], of `rows` of the queries and `columns` of a tile's gallery: a search's distances, to the bit."""
    if not queries.is_cuda:
        return pair_distances(queries, gallery, rows, columns, distance=distance)
    # There pairs are added up in another order than in a search.
    measured, row = rows.unique(return_inverse=True)
    return _all_distances(queries[measured], gallery, distance)[row, columns]


def nearer_than(queries: Tensor, gallery: Tensor, limits: Tensor, *, distance: str) -> tuple[Tensor, Tensor]:
    """bool [Q, G] both: what is nearer to a query than its limit [Q], and what has to be measured to know it.

    Found by products in float64, of which most tell. The rest are so near to the limit that products, which
    round |a|^2 / 2 + |b|^2 / 2, or measuring, which rounds distances, may have the two in another order.
    """
    a, b = queries.double(), gallery.double()
    limit, kind = limits.double(), torch.finfo(queries.dtype)
    if distance == "cosine":
        a, b = _unit_rows(a), _unit_rows(b)
        measured = limit + limit.sqrt() + kind.eps  # of unit rows, which may be rounded, too
    else:
        limit = measured = (limit.square() if distance == "euclidean" else limit) / 2
    a_half, b_half = (x.square().sum(dim=1) / 2 for x in (a, b))
    products = a_half + b_half.nan_to_num().max()
    rounding = kind.eps * measured + kind.tiny + torch.finfo(a.dtype).eps * products  # of one addition
    rounding = rounding * (a.shape[1] + 16)
    limit = limit - a_half
    # |a - b|^2 / 2, which for unit rows is 1 - cos, less |a|^2 / 2.
    half = torch.addmm(b_half, a, b.T, alpha=-1)
    nearer = half < (limit - rounding)[:, None]
    farther = half > (limit + rounding)[:, None]
    return nearer, ~(nearer | farther)  # a NaN is neither


def _all_distances(queries: Tensor, gallery: Tensor, distance: str) -> Tensor:
    """[Q, G], of at most MAX_NEIGHBORS rows of a gallery."""
    found = nearest_neighbors(queries, gallery, len(gallery), distance=distance)
    return torch.empty_like(found.distances).scatter_(1, found.indices, found.distances)


def _unit_rows(x: Tensor) -> Tensor:
    """NaN for a row that is zero, at distance 1 from all, or so short that its squares lose digits."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm.where(norm > 1 / LONGEST[x.dtype], torch.nan)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))
