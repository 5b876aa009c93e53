"""Given pairs of own rows and rows anywhere: their distances, and how these pull at the rows of both.

The rows that lie elsewhere are asked for by index, each but once and a bounded number at a time; their
gradients go back the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import compute_dtype
from ..reference.distances import rowwise
from ._batches import Batches, as_bytes

WORKSPACE = 2**17  # elements of rows that are subtracted at a time, of which several copies live together


class Part(NamedTuple):
    """Some of the pairs, and the rows that have come for them."""

    pairs: Tensor  # which of the T
    mine: Tensor  # rows of this rank
    slots: Tensor  # rows of `rows`
    rows: Tensor  # [R, D]
    grad_rows: Tensor  # [R, D], to be added to


class Pairs:
    """Pairs of row `mine` of this rank and row `others`, a global index: int64 [T] both, in any order.

    Made and used by all ranks together. x [n, D] are the rows of this rank.
    """

    def __init__(self, x: Tensor, mine: Tensor, others: Tensor, batches: Batches) -> None:
        self.x, self.batches = x, batches
        wanted, which = others.unique(return_inverse=True)  # ascending: rank by rank
        offsets = torch.tensor(batches.offsets, device=x.device)
        first = torch.searchsorted(wanted, offsets)
        asked_of_me = torch.empty_like(first[1:])
        dist.all_to_all_single(asked_of_me, first.diff(), group=batches.group)
        self.ask, self.answer = first.diff().tolist(), asked_of_me.tolist()
        # Of every rank at most so many rows at a time: all together no more than a batch, either way.
        self.at_a_time = max(1, -(-max(batches.sizes) // batches.world_size))
        most = first.diff().max()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=batches.group)
        self.rounds = -(-int(most) // self.at_a_time)
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
        dtype = compute_dtype(self.x)
        found = self.x.new_empty(len(self.order), dtype=dtype)

        def measure(part: Part) -> None:
            own, other = self.x[part.mine].to(dtype), part.rows[part.slots].to(dtype)
            found[part.pairs] = rowwise(own, other, distance)

        self._in_parts(measure, None)
        return found

    def pull(self, weights: Tensor, distance: str) -> Tensor:
        """[n, D], the gradient of the sum over all ranks' pairs of weight [T] times distance."""
        dtype = compute_dtype(self.x)
        grad = self.x.new_zeros(self.x.shape, dtype=dtype)

        def differentiate(part: Part) -> None:
            own = self.x[part.mine].to(dtype).requires_grad_()
            other = part.rows[part.slots].to(dtype).requires_grad_()
            with torch.enable_grad():
                d = rowwise(own, other, distance)
            grad_own, grad_other = torch.autograd.grad(d, (own, other), weights[part.pairs].to(dtype))
            # In a fixed order on every device, which index_add_ does not promise.
            grad.index_put_((part.mine,), grad_own, accumulate=True)
            part.grad_rows.index_put_((part.slots,), grad_other, accumulate=True)

        self._in_parts(differentiate, grad)
        return grad

    def _in_parts(self, work: Callable[[Part], None], grad: Tensor | None) -> None:
        """Calls `work` for all pairs and, if there is a `grad` [n, D], adds what others have for its rows."""
        x, start = self.x, 0
        size = max(1, WORKSPACE // x.shape[1])
        for turn in range(self.rounds):
            ask, answer = self._of_turn(self.ask, turn), self._of_turn(self.answer, turn)
            wanted = self.wanted[start : start + sum(ask)]
            requested = self._swap(wanted, answer, ask) - self.batches.offset
            rows = self._swap(x[requested], ask, answer)
            grad_rows = torch.zeros_like(rows, dtype=compute_dtype(x)) if grad is not None else rows
            ends = torch.tensor([start, start + len(wanted)], device=x.device)
            low, high = torch.searchsorted(self.which, ends).tolist()
            for begin in range(low, high, size):
                some = slice(begin, min(begin + size, high))
                work(Part(self.order[some], self.mine[some], self.which[some] - start, rows, grad_rows))
            if grad is not None:
                grad.index_put_((requested,), self._swap(grad_rows, answer, ask), accumulate=True)
            start += len(wanted)

    def _of_turn(self, counts: list[int], turn: int) -> list[int]:
        return [max(0, min(count - turn * self.at_a_time, self.at_a_time)) for count in counts]

    def _swap(self, sent: Tensor, received: list[int], given: list[int]) -> Tensor:
        """Sends `given` rows to each rank and returns the `received` ones from each."""
        found = sent.new_empty(sum(received), *sent.shape[1:])
        row_bytes = sent.element_size() * sent.shape[1:].numel()
        splits = [[row_bytes * n for n in counts] for counts in (received, given)]
        dist.all_to_all_single(
            as_bytes(found), as_bytes(sent.contiguous()), *splits, group=self.batches.group
        )
        return found
