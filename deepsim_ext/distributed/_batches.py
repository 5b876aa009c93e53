"""What every rank knows of all ranks' batches: their sizes and labels, and where the rows of each begin.

The union of the batches has its rows in the order of the ranks: "global" indices number them so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks.texts import short_name
from ._agree import agree


class Batches(NamedTuple):
    """The batches of all ranks of a group."""

    group: ProcessGroup | None  # None: one rank only
    rank: int
    sizes: tuple[int, ...]  # rows, by rank
    offsets: tuple[int, ...]  # global index of the first row, by rank; then the number of all rows
    labels: Tensor  # int64 [N], of all rows
    with_gradient: bool = False  # of the rows of any rank

    @staticmethod
    def of_ranks(group: ProcessGroup | None, sizes: Sequence[int], device: torch.device) -> Batches:
        """Without labels."""
        rank = 0 if group is None else dist.get_rank(group)
        return Batches(group, rank, (), (), torch.empty(0, dtype=torch.int64, device=device)).of_sizes(sizes)

    @property
    def world_size(self) -> int:
        return len(self.sizes)

    @property
    def offset(self) -> int:
        return self.offsets[self.rank]

    def rows(self, rank: int) -> slice:
        return slice(self.offsets[rank], self.offsets[rank + 1])

    def of_sizes(self, sizes: Sequence[int]) -> Batches:
        """Others of the same ranks; labels are none of theirs."""
        return self._replace(sizes=tuple(sizes), offsets=(0, *itertools.accumulate(sizes)))


def exchange(
    function: str, group: ProcessGroup, options: Any, check: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Batches]:
    """Calls `check` for the embeddings [n, D] and labels [n] of this rank, and tells the others.

    Raises on all ranks if `check` raises on one, and if D, dtype, kind of device or `options`, which are
    compared by their repr, are not the same everywhere. Returns the embeddings, detached and their rows
    adjacent in memory, and what is known of all.
    """

    def check_here() -> tuple[Any, str, tuple[int, bool]]:
        embeddings, labels = check()
        own = len(labels), is_differentiated(embeddings)
        return (embeddings, labels), f"{kind_of(embeddings)} for {function}{options!r}", own

    (embeddings, labels), found = agree(function, group, "embeddings", check_here)
    sizes, differentiated = zip(*found, strict=True)
    batches = Batches.of_ranks(group, sizes, labels.device)
    batches = batches._replace(labels=gather_rows(labels, batches), with_gradient=any(differentiated))
    return embeddings.detach().contiguous(), batches


def kind_of(x: Tensor) -> str:
    """What has to be the same on all ranks."""
    return f"{short_name(x.dtype)} [n, {x.shape[1]}] on {x.device.type}"


def is_differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


# By its newer name where there is one: then torch warns of the older.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather_rows(x: Tensor, batches: Batches) -> Tensor:
    """[N, ...] of all ranks' [n, ...], in global order."""
    if batches.group is None:
        return x
    most = max(batches.sizes)
    padded = x if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    gathered = x.new_empty(batches.world_size, most, *x.shape[1:])
    _all_gather(as_bytes(gathered), as_bytes(padded), group=batches.group)
    if len(set(batches.sizes)) == 1:
        return gathered.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(gathered, batches.sizes, strict=True)])


def add_up(x: Tensor, batches: Batches) -> Tensor:
    """The sum of x over all ranks, the same bits on each."""
    dist.all_reduce(x, group=batches.group)
    return x


def as_bytes(x: Tensor) -> Tensor:
    """x as a flat uint8 tensor, for those backends that move few dtypes. x is contiguous."""
    return x.reshape(-1).view(torch.uint8)
