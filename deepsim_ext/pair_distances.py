"""Distances of listed pairs of rows, and their gradient.

Losses over several processes end with them, and those of triplets that miners have listed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _checks
from ._autograd import differentiable
from .reference.distances import rowwise


def pair_distances(
    embeddings: Tensor, ref_embeddings: Tensor, rows: Tensor, ref_rows: Tensor, *, distance: str = "euclidean"
) -> Tensor:
    """Direct differences of row `rows` of the embeddings and row `ref_rows` of the reference set.

    Args:
        embeddings, ref_embeddings: [N, D] and, in the same dtype, [M, D].
        rows, ref_rows: int64 [T] both, from 0 to N - 1 and M - 1.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).

    Returns:
        [T], float32 or, for float64 embeddings, float64. Differentiable to any order, from the second on in
        plain torch with tensors of [T, D]; the gradient of a Euclidean distance is 0 at 0, that of a cosine
        distance is 0 at a zero vector.

    Raises:
        TypeError: a wrong dtype.
        ValueError: unknown distance, or shapes or devices that do not go together.
        IndexError: no such row. On CUDA, where finding out would wait for the device, the pair is NaN.
    """
    if forward_ad._current_level >= 0:  # the op has no forward mode, which plain torch has
        _checks.choice("pair_distances", "distance", distance, _checks.DISTANCES)
        dtype = _checks.compute_dtype(embeddings)
        return rowwise(embeddings.to(dtype)[rows], ref_embeddings.to(dtype)[ref_rows], distance)
    return _distances(embeddings, ref_embeddings, rows, ref_rows, distance)


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
    return _gradients(weights, distances, embeddings, ref_embeddings, rows, ref_rows, distance)


@torch.library.register_fake("deepsim_ext::pair_distances")
def _(embeddings, ref_embeddings, rows, ref_rows, distance):
    return embeddings.new_empty(rows.shape, dtype=_checks.compute_dtype(embeddings))


@torch.library.register_fake("deepsim_ext::pair_distances_backward")
def _(weights, distances, embeddings, ref_embeddings, rows, ref_rows, distance):
    dtype = _checks.compute_dtype(embeddings)
    return tuple(x.new_empty(x.shape, dtype=dtype) for x in (embeddings, ref_embeddings))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.distance = inputs
    ctx.save_for_backward(output, *tensors)


def _backward(ctx: Any, weights: Tensor) -> tuple[Any, ...]:
    distances, embeddings, ref_embeddings, rows, ref_rows = ctx.saved_tensors
    sets = embeddings, ref_embeddings
    grads = _gradients(weights, distances, *sets, rows, ref_rows, ctx.distance)
    return *(g.to(x.dtype) for g, x in zip(grads, sets, strict=True)), None, None, None


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weights, _, *tensors, ctx.distance = inputs
    ctx.save_for_backward(weights, *tensors)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    weights, embeddings, ref_embeddings, rows, ref_rows = ctx.saved_tensors
    dtype = _checks.compute_dtype(embeddings)

    def distances(x: Tensor, ref: Tensor) -> Tensor:
        return rowwise(x[rows], ref[ref_rows], ctx.distance)

    def gradients(weights: Tensor, x: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(distances, x, ref)[1](weights)

    sets = embeddings.to(dtype), ref_embeddings.to(dtype)
    grad_weights, grad_x, grad_ref = torch.func.vjp(gradients, weights, *sets)[1](grads)
    grad_sets = grad_x.to(embeddings.dtype), grad_ref.to(embeddings.dtype)
    return grad_weights, None, *grad_sets, None, None, None


_gradients = differentiable("pair_distances_backward", _double_backward, _save_for_double_backward)
_distances = differentiable("pair_distances", _backward, _save)
