"""Embeddings that a search takes from anywhere: what is common to tensors and to arrays on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ._checks import compute_dtype
from ._checks import evaluation as evaluation_checks
from ._checks import rows as checks
from ._checks.options import positive_integer
from ._mapped_rows import MappedRows
from ._nearest_rows import check_comparable
from ._references import InMemory, References


class RowSource(Protocol):
    """Rows [N, D], which become tensors of one dtype on one device where they are asked for."""

    dtype: torch.dtype  # of the arithmetic

    def stand_in(self, companion: Any, dtype: torch.dtype) -> Any:
        """What checks of tensors look at in place of the rows, beside `companion`."""

    def become(self, dtype: torch.dtype, device: torch.device, chunk_rows: int | None) -> None:
        """What rows are given as, and how many at a time; ValueError for those in memory that are not
        comparable, for others when they are read."""

    def read_all(self) -> None:
        """To find those that are not comparable before anything is computed."""

    def references(self, labels: Tensor | None, distance: str, first: int = 0) -> References:
        """All of them; `first` is the index of the first."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Tensor: ...


class TensorRows:
    """A tensor's rows."""

    def __init__(self, function: str, argument: str, x: Tensor) -> None:
        self.function, self.argument, self.x = function, argument, x
        self.dtype = compute_dtype(x)

    def stand_in(self, companion: Any, dtype: torch.dtype) -> Any:
        return self.x

    def become(self, dtype: torch.dtype, device: torch.device, chunk_rows: int | None) -> None:
        self.dtype = dtype
        self.x = self.x.detach().to(dtype)
        check_comparable(self.function, self.argument, self.x)

    def read_all(self) -> None:
        pass

    def references(self, labels: Tensor | None, distance: str, first: int = 0) -> InMemory:
        return InMemory(self.x, labels, distance, first)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.x[rows]


def row_source(function: str, argument: str, x: Any) -> RowSource:
    """Of a tensor, an array or a file."""
    return TensorRows(function, argument, x) if isinstance(x, Tensor) else MappedRows(function, argument, x)


def prepare_search(
    function: str, queries: Any, gallery: RowSource, k: Any, *, distance: str, chunk_rows: Any
) -> tuple[Tensor, int]:
    """Checks all but that k is at most the number of rows; queries in the arithmetic's dtype, and k."""
    like = gallery.stand_in(queries, queries.dtype if isinstance(queries, Tensor) else gallery.dtype)
    queries, _, k = checks.neighbors_in_parts(function, queries, like, k, distance=distance)
    dtype = torch.promote_types(compute_dtype(queries), gallery.dtype)
    gallery.become(dtype, queries.device, _chunk_rows(function, chunk_rows))
    queries = queries.detach().to(dtype)
    check_comparable(function, "queries", queries)
    return queries, k


def prepare_metrics(
    function: str,
    embeddings: Any,
    labels: Tensor,
    ref_embeddings: Any,
    ref_labels: Tensor | None,
    *,
    source: Callable[[str, str, Any], RowSource],
    recall_at: Any,
    distance: str,
    avg_of_avgs: bool,
    chunk_rows: Any,
) -> tuple[RowSource, RowSource | None, list[int]]:
    """Checks everything, all rows as well: the embeddings, the references or None if they are the embeddings
    themselves, and `recall_at`."""
    x = source(function, "embeddings", embeddings)
    sources, like_refs, refs = [x], None, None
    if ref_embeddings is not None and ref_embeddings is not embeddings:
        refs = source(function, "ref_embeddings", ref_embeddings)
        sources.append(refs)
    dtype = functools.reduce(torch.promote_types, (rows.dtype for rows in sources))
    like = x.stand_in(labels, dtype)
    if ref_embeddings is not None:
        like_refs = like if refs is None else refs.stand_in(labels, dtype)
    recall_at = evaluation_checks.retrieval_metrics(
        function,
        like,
        labels,
        like_refs,
        ref_labels,
        recall_at=recall_at,
        distance=distance,
        avg_of_avgs=avg_of_avgs,
    ).recall_at
    chunk_rows = _chunk_rows(function, chunk_rows)
    for rows in sources:
        rows.become(dtype, labels.device, chunk_rows)
        rows.read_all()
    return x, refs, recall_at


def _chunk_rows(function: str, chunk_rows: Any) -> int | None:
    return None if chunk_rows is None else positive_integer(function, "chunk_rows", chunk_rows)
