"""References on disk, chunk by chunk as if in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ._nearest_rows import merge, no_neighbors
from ._references import Advance, InMemory, Matches, Queries, no_match
from .results import NearestNeighbors


class OnDisk(NamedTuple):
    """References that follow one another, read anew for each question."""

    chunks: Callable[
        [], Iterator[tuple[int, Tensor]]
    ]  # where among the rows each begins, and its rows [C, D]
    labels: Tensor | None  # int64 [M]; None where only neighbours are asked for
    distance: str
    first: int  # index

    def nearest(self, queries: Tensor, k: int, advance: Advance = lambda _: None) -> NearestNeighbors:
        found = no_neighbors(queries)
        for chunk in self._in_memory():
            found = merge(k, found, chunk.nearest(queries, k, advance))
        return found

    def matches(self, queries: Queries) -> Matches:
        nearest = no_match(queries)
        if len(queries.labels):
            for chunk in self._in_memory():
                nearest = nearest.nearer(chunk.matches(queries))
        return nearest

    def before(self, queries: Queries, matches: Matches) -> Tensor:
        count = torch.zeros_like(queries.labels)
        if len(queries.labels):
            for chunk in self._in_memory():
                count += chunk.before(queries, matches)
        return count

    def _in_memory(self) -> Iterator[InMemory]:
        for begin, rows in self.chunks():
            labels = None if self.labels is None else self.labels[begin : begin + len(rows)]
            yield InMemory(rows, labels, self.distance, self.first + begin)
