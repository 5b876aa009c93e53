"""References of retrieval metrics: their labels, the nearest of them, and what stands before the first match.

Three kinds have the same three answers, of which the metrics are made: in memory, mapped from a file
(`mapped.py`), and spread over the ranks of a group (`distributed/`). An index of a reference counts from the
first of all, also where only some of them are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._nearest_rows import nearest_rows, no_neighbors, stripes
from .results import NearestNeighbors

Advance = Callable[[int], object]  # to be called with how much more is done


class Queries(NamedTuple):
    """Some of the embeddings."""

    embeddings: Tensor  # [Q, D]
    labels: Tensor  # int64 [Q]
    own: Tensor | None  # int64 [Q], index of each among the references; None: they are not among them

    def take(self, rows: slice | Tensor) -> Queries:
        return Queries(*(None if t is None else t[rows] for t in self))


class Matches(NamedTuple):
    """The nearest reference of the same label, for every query."""

    distances: Tensor  # [Q]; inf where there is none
    indices: Tensor  # int64 [Q]

    def nearer(self, other: Matches) -> Matches:
        """Of two for every query; equal distances by index."""
        same = self.distances == other.distances
        keep = (self.distances < other.distances) | (same & (self.indices < other.indices))
        return Matches(*(torch.where(keep, a, b) for a, b in zip(self, other, strict=True)))


class References(Protocol):
    def nearest(self, queries: Tensor, k: int, advance: Advance = ...) -> NearestNeighbors:
        """The k nearest of all, or all if they are fewer; equal distances by ascending index.

        `advance` is told of rows that have been searched.
        """

    def matches(self, queries: Queries) -> Matches:
        """The nearest of each query's label that is not its own."""

    def before(self, queries: Queries, matches: Matches) -> Tensor:
        """int64 [Q]: how many that are not a query's own are nearer than its match."""


def no_match(queries: Queries) -> Matches:
    """Farther than any."""
    nowhere = torch.full_like(queries.labels, torch.iinfo(torch.int64).max)
    return Matches(queries.embeddings.new_full(nowhere.shape, torch.inf), nowhere)


class InMemory(NamedTuple):
    """References that follow one another."""

    embeddings: Tensor  # [M, D]
    labels: Tensor | None  # int64 [M]; None where only neighbours are asked for
    distance: str
    first: int = 0  # index

    def nearest(self, queries: Tensor, k: int, advance: Advance = lambda _: None) -> NearestNeighbors:
        k = min(k, len(self.embeddings))
        if not k:
            return no_neighbors(queries)
        found = nearest_rows(queries, self.embeddings, k, distance=self.distance)
        advance(len(self.embeddings))
        return found._replace(indices=found.indices + self.first)

    def matches(self, queries: Queries) -> Matches:
        found = no_match(queries)
        if len(self.labels):
            for rows, part, distances in self._distances(queries):
                match = self.labels == part.labels[:, None]
                found.distances[rows], index = torch.where(match, distances, torch.inf).min(dim=1)
                found.indices[rows] = index + self.first
        return found

    def before(self, queries: Queries, matches: Matches) -> Tensor:
        count = torch.zeros_like(queries.labels)
        for rows, _, distances in self._distances(queries):
            nearest, index = (t[rows, None] for t in matches)
            earlier = (distances == nearest) & (self._indices() < index)
            count[rows] = ((distances < nearest) | earlier).sum(dim=1)
        return count

    def _distances(self, queries: Queries) -> Iterator[tuple[slice, Queries, Tensor]]:
        """A few queries at a time: which, those, and their distances [q, M]; inf from their own rows."""
        for rows, distances in stripes(queries.embeddings, self.embeddings, distance=self.distance):
            part = queries.take(rows)
            if part.own is not None:
                distances.masked_fill_(self._indices() == part.own[:, None], torch.inf)
            yield rows, part, distances

    def _indices(self) -> Tensor:
        return torch.arange(self.first, self.first + len(self.labels), device=self.labels.device)
