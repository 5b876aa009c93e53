"""Distances between rows, each a direct difference."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """[N, M] distances between the rows of x [N, D] and y [M, D], to choose by: no second gradient."""
    if distance == "cosine":
        zero = zero_rows(x)[:, None] | zero_rows(y)[None, :]
        return torch.where(zero, 1.0, pairwise(unit_rows(x), unit_rows(y), "sqeuclidean") / 2)
    d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return d if distance == "euclidean" else d.square()


def all_distances(
    embeddings: Tensor, ref_embeddings: Tensor | None, dtype: torch.dtype, distance: str
) -> Tensor:
    """[N, M] distances in `dtype`, differentiable to any order, by way of an [N, M, D] tensor."""
    x = embeddings.to(dtype)
    refs = x if ref_embeddings is None else ref_embeddings.to(dtype)
    return rowwise(x[:, None], refs[None], distance)


def rowwise(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """Distances between the rows of a and b, [..., D] each, differentiable to any order also at 0."""
    if distance == "cosine":  # of unit vectors, 1 - a.b = |a - b|^2 / 2, which does not cancel
        zero = zero_rows(a) | zero_rows(b)
        return torch.where(zero, 1.0, rowwise(unit_rows(a), unit_rows(b), "sqeuclidean") / 2)
    squared = (a - b).square().sum(dim=-1)
    return _sqrt(squared) if distance == "euclidean" else squared


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose gradients, of any order, are 0 at 0: there, sqrt itself never sees the 0."""
    return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt())


def zero_rows(x: Tensor) -> Tensor:
    return (x == 0).all(dim=-1)


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to length 1, whatever the range of their squares; a zero row stays zero."""
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)
    squared = x.square().sum(dim=-1, keepdim=True)
    return x / torch.where(squared == 0, 1.0, squared).sqrt()
