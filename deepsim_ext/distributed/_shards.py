"""References that lie on all ranks, each rank's part after that of the rank before it.

Queries go to the references: those of all ranks are gathered, every rank looks for them in its own part once,
and what it has found goes home. A search takes far longer than that way, so nothing is done meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._nearest_rows import merge
from .._references import Advance, Matches, Queries, References
from ..results import NearestNeighbors
from ._agree import agree
from ._batches import Batches, as_bytes, gather_rows

Found = TypeVar("Found")
NOWHERE = torch.iinfo(torch.int64).max


class Shards(NamedTuple):
    """Asked by all ranks together, each with queries of its own, of any number."""

    function: str  # that raises where a rank fails
    local: References  # this rank's
    batches: Batches  # of the references

    def nearest(self, queries: Tensor, k: int, advance: Advance = lambda _: None) -> NearestNeighbors:
        batches, most = self._counts(len(queries), k)
        everyone = gather_rows(queries, batches)
        found = self._answer(lambda: self.local.nearest(everyone, most, advance))
        missing = most - found.distances.shape[1]  # this part has fewer rows
        distances = torch.nn.functional.pad(found.distances, (0, missing), value=torch.inf)
        indices = torch.nn.functional.pad(found.indices, (0, missing), value=NOWHERE)
        by_rank = (_send_home(t, batches) for t in (distances, indices))
        return merge(k, *(NearestNeighbors(*of_rank) for of_rank in zip(*by_rank, strict=True)))

    def matches(self, queries: Queries) -> Matches:
        batches, _ = self._counts(len(queries.labels))
        everyone = _gather(queries, batches)
        found = self._answer(lambda: self.local.matches(everyone))
        first, *others = map(Matches, *(_send_home(t, batches) for t in found))
        for other in others:
            first = first.nearer(other)
        return first

    def before(self, queries: Queries, matches: Matches) -> Tensor:
        batches, _ = self._counts(len(queries.labels))
        everyone, their_matches = (
            _gather(queries, batches),
            Matches(*(gather_rows(t, batches) for t in matches)),
        )
        count = self._answer(lambda: self.local.before(everyone, their_matches))
        return _send_home(count, batches).sum(dim=0)

    def in_step(self, parts: Iterator[Tensor]) -> Iterator[Tensor]:
        """As many parts as the rank with most has, the last ones empty."""
        empty = torch.empty(0, dtype=torch.int64, device=self.batches.labels.device)
        while True:
            part = next(parts, empty)
            batches, _ = self._counts(len(part))
            if not batches.offsets[-1]:
                return
            yield part

    def _counts(self, count: int, k: int = 0) -> tuple[Batches, int]:
        """How many queries each rank has, and the largest k."""
        own = torch.tensor([[count, k]], device=self.batches.labels.device)
        one_each = self.batches.of_sizes([1] * self.batches.world_size)
        counts, ks = gather_rows(own, one_each).T.tolist()
        return self.batches.of_sizes(counts), max(ks)

    def _answer(self, search: Callable[[], Found]) -> Found:
        """Reading may fail on one rank: all are told before they wait for what it found."""
        return agree(self.function, self.batches.group, "references", lambda: (search(), None, None))[0]


def _gather(queries: Queries, batches: Batches) -> Queries:
    return Queries(*(None if t is None else gather_rows(t, batches) for t in queries))


def _send_home(found: Tensor, batches: Batches) -> Tensor:
    """[world_size, q, ...]: what every rank has found for this rank's queries. found [Q, ...] is for those of
    all ranks."""
    world, own = batches.world_size, batches.sizes[batches.rank]
    if batches.group is None:
        return found.unsqueeze(0)
    home = found.new_empty(world, own, *found.shape[1:])
    row_bytes = math.prod(found.shape[1:]) * found.element_size()
    dist.all_to_all_single(
        as_bytes(home),
        as_bytes(found.contiguous()),
        output_split_sizes=[own * row_bytes] * world,
        input_split_sizes=[size * row_bytes for size in batches.sizes],
        group=batches.group,
    )
    return home
