"""Given pairs of own rows and rows anywhere: their distances, and how these pull at the rows of both.

The rows that lie elsewhere are asked for by index, each but once and a bounded number at a time; their
gradients go back the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import compute_dtype
from ..pair_distances import pair_distances, pair_distances_backward
from ._batches import Batches, as_bytes


class Turn(NamedTuple):
    """Rows that have come together, and their pairs."""

    rows: Tensor  # [R, D]
    pairs: Tensor  # which of the T
    mine: Tensor  # rows of this rank
    slots: Tensor  # rows of `rows`
    requested: Tensor  # rows of this rank that others have got, rank by rank
    ask: list[int]  # how many of `rows` came from each rank
    answer: list[int]  # how many of `requested` went to each rank


class Pairs:
    """Pairs of row `mine` of this rank and row `others`, a global index: int64 [T] both, in any order.

    Made and used by all ranks together. x [n, D] are the rows of this rank.
    """

    def __init__(self, x: Tensor, mine: Tensor, others: Tensor, batches: Batches) -> None:
        self.x, self.batches = x, batches
        wanted, which = others.unique(return_inverse=True)  # ascending: rank by rank
        offsets = torch.tensor(batches.offsets, device=x.device)
        first = torch.searchsorted(wanted, offsets)
        # One exchange: how many rows of each other a rank wants, of whom it wants most, and of all.
        counts = first.diff()
        most_and_all = torch.stack([counts.max(), counts.sum()]).expand(len(counts), 2)
        said = torch.cat([counts[:, None], most_and_all], dim=1)
        heard = torch.empty_like(said)
        dist.all_to_all_single(heard, said, group=batches.group)
        self.answer, most, wanted_by = heard.T.tolist()
        self.ask = counts.tolist()
        # Of every rank at most so many rows at a time: all together no more than two batches, either way.
        two_batches = 2 * max(batches.sizes)
        self.at_a_time = max(1, -(-two_batches // batches.world_size))
        self.turns = -(-max(most) // self.at_a_time)
        self.keeps = max(wanted_by) <= two_batches
        self.kept: list[Turn] = []
        # Wanted rows in the order in which they come, and the pairs in the order of their rows.
        owner = torch.searchsorted(offsets[1:], wanted, right=True)
        turn = (torch.arange(len(wanted), device=x.device) - first[owner]) // self.at_a_time
        order = turn.argsort(stable=True)
        self.wanted = wanted[order]
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=x.device)
        which = position[which]
        self.order = which.argsort(stable=True)
        self.mine, self.which = mine[self.order], which[self.order]

    def distances(self, distance: str) -> Tensor:
        """[T], float32 or, for float64 rows, float64."""
        found = self.x.new_empty(len(self.order), dtype=compute_dtype(self.x))
        for turn in self._turns():
            found[turn.pairs] = pair_distances(self.x, turn.rows, turn.mine, turn.slots, distance=distance)
        return found

    def pull(self, weights: Tensor, distances: Tensor, distance: str) -> Tensor:
        """[n, D], the gradient of the sum over all ranks' pairs of weight [T] times distance.

        distances are what `distances` gave; weights are of their dtype.
        """
        grad = None
        for turn in self._turns():
            of_pairs = weights[turn.pairs], distances[turn.pairs]
            rows = self.x, turn.rows, turn.mine, turn.slots
            own, theirs = pair_distances_backward(*of_pairs, *rows, distance=distance)
            theirs = self._swap(theirs, turn.answer, turn.ask)
            grad = own if grad is None else grad.add_(own)
            # In a fixed order on every device, which index_add_ does not promise.
            grad.index_put_((turn.requested,), theirs, accumulate=True)
        return self.x.new_zeros(self.x.shape, dtype=compute_dtype(self.x)) if grad is None else grad

    def _turns(self) -> Iterator[Turn]:
        """As many for every rank. What has come is kept for the next time if it's little on every rank."""
        if len(self.kept) == self.turns:
            yield from self.kept
            return
        start = 0
        for number in range(self.turns):
            turn = self._fetch(number, start)
            if self.keeps:
                self.kept.append(turn)
            yield turn
            start += len(turn.rows)

    def _fetch(self, number: int, start: int) -> Turn:
        """The wanted rows from `start` on."""
        ask, answer = self._of_turn(self.ask, number), self._of_turn(self.answer, number)
        wanted = self.wanted[start : start + sum(ask)]
        requested = self._swap(wanted, answer, ask) - self.batches.offset
        rows = self._swap(self.x[requested], ask, answer)
        ends = torch.tensor([start, start + len(wanted)], device=self.x.device)
        some = slice(*torch.searchsorted(self.which, ends).tolist())
        slots = self.which[some] - start
        return Turn(rows, self.order[some], self.mine[some], slots, requested, ask, answer)

    def _of_turn(self, counts: list[int], number: int) -> list[int]:
        return [max(0, min(count - number * self.at_a_time, self.at_a_time)) for count in counts]

    def _swap(self, sent: Tensor, received: list[int], given: list[int]) -> Tensor:
        """Sends `given` rows to each rank and returns the `received` ones from each."""
        found = sent.new_empty(sum(received), *sent.shape[1:])
        row_bytes = sent.element_size() * sent.shape[1:].numel()
        splits = [[row_bytes * n for n in counts] for counts in (received, given)]
        dist.all_to_all_single(
            as_bytes(found), as_bytes(sent.contiguous()), *splits, group=self.batches.group
        )
        return found
