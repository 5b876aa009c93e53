"""Exact nearest neighbours, without the matrix of all distances."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._autograd import register_vmap_by_loop
from .results import NearestNeighbors


def nearest_neighbors(
    queries: Tensor, gallery: Tensor | None, k: int, *, distance: str = "euclidean"
) -> NearestNeighbors:
    """The k nearest rows of `gallery` for every row of `queries`, nearest first.

    Source: the rule of Cover and Hart, "Nearest Neighbor Pattern Classification" (1967), for k neighbours.
    All distances are direct differences of two rows, whatever other rows there are, and of equal ones those
    of lowest index are taken, at the last place too: what is found in parts of a gallery can be merged. On
    the CPU tiles of distances choose which rows are measured, with some to spare; where their rounding leaves
    a doubt, as with many duplicates, a query is compared with the whole gallery. Memory is O(Q k) beyond
    copies of the inputs; up to 32 queries are compared with the gallery directly and nothing is copied (in
    float32 and float64; by cosine distance up to 2). On CUDA memory is O(Q k) and 16 MiB.

    Args:
        queries: [Q, D] with D >= 1; float32, float64, bfloat16 or float16.
        gallery: [G, D], dtype of `queries` or, under autocast, a mix that goes to the widest. None, or
            `queries` itself: the other rows of `queries`, where no row is its own neighbour.
        k: an integer from 1 to 1024, at most G, or Q - 1 where the gallery is the queries themselves.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).

    Returns:
        `NearestNeighbors`: distances [Q, k], ascending, float32 or, for float64 input, float64, and indices
        int64 [Q, k], ascending among equal distances. Half inputs are computed in float32. Nothing has a
        gradient. A NaN or inf anywhere makes all distances NaN and all indices -1, and so do rows too long
        for their squares (1e18 in float32).

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance, `k` out of range, or shapes or devices that do not go together.
    """
    queries, gallery, k = _checks.nearest_neighbors(
        "nearest_neighbors", queries, gallery, k, distance=distance
    )
    gallery = None if gallery is None else gallery.detach()
    distances, indices = torch.ops.deepsim_ext.nearest_neighbors(queries.detach(), gallery, k, distance)
    return NearestNeighbors(distances, indices)


@torch.library.register_fake("deepsim_ext::nearest_neighbors")
def _(queries, gallery, k, distance):
    shape = (queries.shape[0], k)
    dtype = _checks.compute_dtype(queries)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


register_vmap_by_loop("nearest_neighbors")
