"""Nearest neighbours by sorting all distances."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..results import NearestNeighbors
from .distances import pairwise
from .finite import all_finite


@torch.no_grad()
def nearest_neighbors(
    queries: Tensor, gallery: Tensor | None, k: int, *, distance: str = "euclidean"
) -> NearestNeighbors:
    """The k nearest rows of `gallery` for every row of `queries`, nearest first.

    Source: the rule of Cover and Hart, "Nearest Neighbor Pattern Classification" (1967), for k neighbours.

    Args:
        queries: [Q, D] with D >= 1; float32, float64, bfloat16 or float16.
        gallery: [G, D], dtype of `queries` or, under autocast, a mix that goes to the widest. None, or
            `queries` itself: the other rows of `queries`, where no row is its own neighbour.
        k: an integer from 1 to 1024, at most G, or Q - 1 where the gallery is the queries themselves.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).

    Returns:
        `NearestNeighbors`: distances [Q, k], ascending, float32 or, for float64 input, float64, and indices
        int64 [Q, k], ascending among equal distances. Half inputs are computed in float32. Nothing has a
        gradient. A NaN or inf anywhere makes all distances NaN and all indices -1.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance, `k` out of range, or shapes or devices that do not go together.
    """
    queries, gallery, k = _checks.nearest_neighbors(
        "nearest_neighbors", queries, gallery, k, distance=distance
    )
    x = queries.to(_checks.compute_dtype(queries))
    d = pairwise(x, x if gallery is None else gallery.to(x.dtype), distance)
    if gallery is None:
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        d = torch.where(itself, torch.nan, d)  # which is sorted behind every number
    distances, indices = (t[:, :k] for t in d.sort(dim=1, stable=True))
    finite = all_finite(queries, gallery)
    return NearestNeighbors(torch.where(finite, distances, torch.nan), torch.where(finite, indices, -1))
