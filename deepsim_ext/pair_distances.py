"""Distances of given pairs of rows, and their gradient: what losses over several processes end with."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, reference


def pair_distances(
    embeddings: Tensor, ref_embeddings: Tensor, rows: Tensor, ref_rows: Tensor, *, distance: str = "euclidean"
) -> Tensor:
    """Direct differences of row `rows` of the embeddings and row `ref_rows` of the reference set.

    Args:
        embeddings, ref_embeddings: [N, D] and, in the same dtype, [M, D].
        rows, ref_rows: int64 [T] both, from 0 to N - 1 and M - 1.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).

    Returns:
        [T], float32 or, for float64 embeddings, float64.

    Raises:
        TypeError: a wrong dtype.
        ValueError: unknown distance, or shapes or devices that do not go together.
        IndexError: no such row.
    """
    return torch.ops.deepsim_ext.pair_distances(embeddings, ref_embeddings, rows, ref_rows, distance)


def pair_distances_backward(
    weights: Tensor,
    distances: Tensor,
    embeddings: Tensor,
    ref_embeddings: Tensor,
    rows: Tensor,
    ref_rows: Tensor,
    *,
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor]:
    """Gradients [N, D] and [M, D] of the sum of weights [T] times distances [T], those of `pair_distances`.

    All are in the type of the arithmetic. Rows at distance 0 do not pull. Bitwise repeatable: every row adds
    up its pairs in their order.
    """
    arguments = (weights, distances, embeddings, ref_embeddings, rows, ref_rows, distance)
    return torch.ops.deepsim_ext.pair_distances_backward(*arguments)


@torch.library.register_fake("deepsim_ext::pair_distances")
def _(embeddings, ref_embeddings, rows, ref_rows, distance):
    return embeddings.new_empty(rows.shape, dtype=_checks.compute_dtype(embeddings))


@torch.library.register_fake("deepsim_ext::pair_distances_backward")
def _(weights, distances, embeddings, ref_embeddings, rows, ref_rows, distance):
    dtype = _checks.compute_dtype(embeddings)
    return tuple(x.new_empty(x.shape, dtype=dtype) for x in (embeddings, ref_embeddings))


torch.library.impl("deepsim_ext::pair_distances", "cuda", reference.pair_distances)
torch.library.impl("deepsim_ext::pair_distances_backward", "cuda", reference.pair_distances_backward)
