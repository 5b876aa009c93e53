"""Distances of given pairs of rows and their gradient, some pairs at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._checks import compute_dtype
from .distances import rowwise

WORKSPACE = 2**20  # elements of rows that are subtracted at a time, of which several copies live together


@torch.no_grad()
def pair_distances(
    embeddings: Tensor, ref_embeddings: Tensor, rows: Tensor, ref_rows: Tensor, distance: str
) -> Tensor:
    """Arguments and result are those of `deepsim_ext.pair_distances.pair_distances`."""
    dtype = compute_dtype(embeddings)
    found = [embeddings.new_empty(0, dtype=dtype)]
    for some, others in _in_parts(embeddings, rows, ref_rows):
        found.append(rowwise(embeddings[some].to(dtype), ref_embeddings[others].to(dtype), distance))
    return torch.cat(found)


@torch.no_grad()
def pair_distances_backward(
    weights: Tensor,
    distances: Tensor,
    embeddings: Tensor,
    ref_embeddings: Tensor,
    rows: Tensor,
    ref_rows: Tensor,
    distance: str,
) -> tuple[Tensor, Tensor]:
    """Of `deepsim_ext.pair_distances.pair_distances_backward`; measures again what `distances` says."""
    dtype = compute_dtype(embeddings)
    grads = tuple(torch.zeros_like(x, dtype=dtype) for x in (embeddings, ref_embeddings))
    for some, others, weight in _in_parts(embeddings, rows, ref_rows, weights):
        a, b = embeddings[some].to(dtype), ref_embeddings[others].to(dtype)
        pulls = torch.func.vjp(partial(rowwise, distance=distance), a, b)[1](weight)
        # In a fixed order on every device, which index_add_ does not promise.
        for grad, where, part in zip(grads, (some, others), pulls, strict=True):
            grad.index_put_((where,), part, accumulate=True)
    return grads


def _in_parts(x: Tensor, *by_pair: Tensor):
    return zip(*(t.split(max(1, WORKSPACE // x.shape[1])) for t in by_pair), strict=True)
