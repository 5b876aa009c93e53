"""The matrix of all distances between two sets of rows, for lists that have most pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.distances import pairwise, rowwise, unit_rows, zero_rows

# Squares below this share of |a|^2 + |b|^2 are measured by differences. A float64 product leaves the others
# eight digits, which are as many as a float32 has.
CLOSE = 1e-7
# Coordinates to subtract, up to which all pairs are measured by differences: a product takes more calls.
FEW = 2**21


def distance_matrix(x: Tensor, ref: Tensor, distance: str) -> Tensor:
    """[N, M] distances of float32 or float64 rows [N, D] and [M, D] in their dtype, differentiable.

    As exact as direct differences. On the CPU many float32 rows are multiplied, in float64, which takes a
    fraction of the time; elsewhere looking for those that are close would wait for the device.
    """
    if x.dtype == torch.float64 or x.device.type != "cpu" or len(x) * ref.numel() <= FEW:
        return pairwise(x, ref, distance)
    if distance == "cosine":
        zero = zero_rows(x)[:, None] | zero_rows(ref)
        return torch.where(zero, 1.0, _squares(unit_rows(x.double()), unit_rows(ref.double())) / 2).float()
    squares = _squares(x.double(), ref.double())
    if distance == "euclidean":
        same = squares == 0
        squares = torch.where(same, 0.0, torch.where(same, 1.0, squares).sqrt())
    return squares.float()


def _squares(x: Tensor, ref: Tensor) -> Tensor:
    # Products would carry what is not finite from its own row to all others.
    finite, ref_finite = (t.detach().isfinite().all(dim=1, keepdim=True) for t in (x, ref))
    center = torch.where(ref_finite, ref.detach(), 0.0).mean(dim=0)
    a, b = torch.where(finite, x - center, 0.0), torch.where(ref_finite, ref - center, 0.0)
    both = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    squares = both - 2 * a @ b.T
    close = squares.detach() <= CLOSE * both.detach()
    rows, columns = (close | ~(finite & ref_finite.T)).nonzero(as_tuple=True)
    if 8 * len(rows) > squares.numel():  # more than they would take all together
        return pairwise(x, ref, "sqeuclidean")
    return squares.index_put((rows, columns), rowwise(x[rows], ref[columns], "sqeuclidean"))
