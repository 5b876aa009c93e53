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

from ._nearest_rows import nearer_than, nearest_rows, no_neighbors, pairs_of_tile, tiles
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

    def take(self, rows: slice | Tensor) -> Matches:
        return Matches(*(t[rows] for t in self))

    def before(self, other: Matches) -> Tensor:
        """bool [Q]: which are nearer than others; equal distances by index."""
        same = self.distances == other.distances
        return (self.distances < other.distances) | (same & (self.indices < other.indices))

    def nearer(self, other: Matches) -> Matches:
        """Of two for every query."""
        keep = self.before(other)
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
        nearest = no_match(queries)
        for rows, part, tile in self._tiles(queries):
            nearer = tile._nearest_matches(part).nearer(nearest.take(rows))
            nearest.distances[rows], nearest.indices[rows] = nearer
        return nearest

    def before(self, queries: Queries, matches: Matches) -> Tensor:
        count = torch.zeros_like(queries.labels)
        for rows, part, tile in self._tiles(queries):
            count[rows] += tile._count_before(part, matches.take(rows))
        return count

    def _tiles(self, queries: Queries) -> Iterator[tuple[slice, Queries, InMemory]]:
        """A few queries at a time, which and those, with a few of the references."""
        for rows, columns in tiles(len(queries.labels), len(self.labels)):
            first = self.first + columns.start
            tile = InMemory(self.embeddings[columns], self.labels[columns], self.distance, first)
            yield rows, queries.take(rows), tile

    def _nearest_matches(self, queries: Queries) -> Matches:
        match = self._without_own(self.labels == queries.labels[:, None], queries)
        distances = queries.embeddings.new_full(match.shape, torch.inf)
        pairs = match.nonzero(as_tuple=True)
        distances[pairs] = self._measured(queries, *pairs)
        nearest, row = distances.min(dim=1)
        return Matches(nearest, row + self.first)

    def _count_before(self, queries: Queries, matches: Matches) -> Tensor:
        before, doubtful = nearer_than(
            queries.embeddings, self.embeddings, matches.distances, distance=self.distance
        )
        query, row = doubtful.nonzero(as_tuple=True)
        measured = Matches(self._measured(queries, query, row), row + self.first)
        before[query, row] = measured.before(matches.take(query))
        return self._without_own(before, queries).sum(dim=1)

    def _measured(self, queries: Queries, query: Tensor, row: Tensor) -> Tensor:
        return pairs_of_tile(queries.embeddings, self.embeddings, query, row, distance=self.distance)

    def _without_own(self, pairs: Tensor, queries: Queries) -> Tensor:
        """bool [Q, M], changed in place: no query with itself."""
        if queries.own is not None:
            row = queries.own - self.first
            here = ((row >= 0) & (row < len(self.labels))).nonzero().squeeze(1)
            pairs[here, row[here]] = False
        return pairs
