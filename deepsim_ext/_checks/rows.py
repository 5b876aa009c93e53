"""Functions of rows without labels: given pairs, given triplets, neighbours."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

from torch import Tensor

from .options import (
    DISTANCES,
    PAIR_REDUCTIONS,
    TRIPLET_REDUCTIONS,
    choice,
    flag,
    margin_value,
    positive_integer,
)
from .tensors import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_columns,
    check_device,
    check_embeddings,
    check_same_shape,
    compute_dtype,
    is_dense,
    match_dtypes,
    tensor_error,
)
from .texts import describe, error

MAX_NEIGHBORS = 1024


class TripletArguments(NamedTuple):
    anchor: Tensor  # [T, D]
    positive: Tensor  # [T, D], dtype of anchor
    negative: Tensor  # [T, D], dtype of anchor
    margin: float


class NeighborArguments(NamedTuple):
    queries: Tensor  # [Q, D]
    gallery: Tensor | None  # [G, D], dtype of queries; None: the self form, no row its own neighbour
    k: int


def contrastive(
    function: str, x1: Tensor, x2: Tensor, y: Tensor, *, margin: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor, float]:
    """All arguments of contrastive_loss; y comes back in the dtype of the arithmetic."""
    margin = contrastive_options(function, margin=margin, reduction=reduction)
    check_embeddings(function, "x1", x1, "[N, D]")
    check_embeddings(function, "x2", x2, "[N, D]")
    check_same_shape(function, "x2", x2, "x1", x1)
    x1, x2 = match_dtypes(function, "x1", x1, "x2", x2, (x1.dtype,))
    dtypes = INTEGER_DTYPES + FLOAT_DTYPES
    if not is_dense(y, dtypes) or y.ndim != 1 or y.shape[0] != x1.shape[0]:
        expected = f"bool, integer or float of shape [N]=[{x1.shape[0]}]"
        raise tensor_error(function, "y", expected, y, dtypes)
    check_device(function, "y", y, "x1", x1)
    if y.requires_grad:
        got = f"{describe(y)} with requires_grad=True"
        raise error(ValueError, function, "y", "a tensor that does not require grad", got)
    return x1, x2, y.to(compute_dtype(x1)), margin


def contrastive_options(function: str, *, margin: float, reduction: str) -> float:
    """All options of contrastive_loss; returns the margin as a float."""
    choice(function, "reduction", reduction, PAIR_REDUCTIONS)
    return margin_value(function, "margin", margin)


def triplet_margin(
    function: str,
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    margin: float,
    swap: bool,
    soft: bool,
    distance: str,
    reduction: str,
) -> TripletArguments:
    """All arguments of triplet_margin_loss."""
    margin = triplet_margin_options(
        function, margin=margin, swap=swap, soft=soft, distance=distance, reduction=reduction
    )
    check_embeddings(function, "anchor", anchor, "[T, D]")
    for argument, x in (("positive", positive), ("negative", negative)):
        check_embeddings(function, argument, x, "[T, D]")
        check_same_shape(function, argument, x, "anchor", anchor)
    anchor, positive = match_dtypes(function, "anchor", anchor, "positive", positive, (anchor.dtype,))
    anchor, negative = match_dtypes(function, "anchor", anchor, "negative", negative, (anchor.dtype,))
    return TripletArguments(anchor, positive.to(anchor.dtype), negative, margin)


def triplet_margin_options(
    function: str, *, margin: float, swap: bool, soft: bool, distance: str, reduction: str
) -> float:
    """All options of triplet_margin_loss; returns the margin as a float."""
    flag(function, "swap", swap)
    flag(function, "soft", soft)
    choice(function, "distance", distance, DISTANCES)
    choice(function, "reduction", reduction, TRIPLET_REDUCTIONS)
    return margin_value(function, "margin", margin)


def nearest_neighbors(
    function: str, queries: Tensor, gallery: Tensor | None, k: int, *, distance: str
) -> NeighborArguments:
    """All arguments of nearest_neighbors."""
    choice(function, "distance", distance, DISTANCES)
    check_embeddings(function, "queries", queries, "[Q, D]")
    if gallery is None or gallery is queries:
        _check_k(function, k, "Q-1", max(queries.shape[0] - 1, 0))
        return NeighborArguments(queries, None, int(k))
    check_embeddings(function, "gallery", gallery, "[G, D]")
    check_columns(function, "gallery", gallery, "G", "queries", queries)
    queries, gallery = match_dtypes(function, "queries", queries, "gallery", gallery, (queries.dtype,))
    _check_k(function, k, "G", gallery.shape[0])
    return NeighborArguments(queries, gallery, int(k))


def neighbors_in_parts(
    function: str, queries: Tensor, gallery: Tensor, k: int, *, distance: str
) -> NeighborArguments:
    """All arguments of a search in a part of a gallery, whose number of rows does not matter to k."""
    choice(function, "distance", distance, DISTANCES)
    check_embeddings(function, "queries", queries, "[Q, D]")
    check_embeddings(function, "gallery", gallery, "[G, D]")
    check_columns(function, "gallery", gallery, "G", "queries", queries)
    queries, gallery = match_dtypes(function, "queries", queries, "gallery", gallery, (queries.dtype,))
    return NeighborArguments(queries, gallery, positive_integer(function, "k", k))


def _check_k(function: str, k: int, rows_name: str, rows: int) -> None:
    kind = None
    if not isinstance(k, Integral) or isinstance(k, bool):
        kind = TypeError
    elif not (1 <= k <= MAX_NEIGHBORS and k <= rows):
        kind = ValueError
    if kind is not None:
        expected = f"an integer from 1 to {MAX_NEIGHBORS} and at most {rows_name}={rows}"
        raise error(kind, function, "k", expected, describe(k))
