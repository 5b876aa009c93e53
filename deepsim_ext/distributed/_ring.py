"""Blocks of rows on their way round the ring of ranks, while tiles of pairs with them are worked on.

At step s a rank holds the rows of the rank s before it, and those of the next step are already under way: at
no time more than two blocks that are not its own. What a step finds out about the visitor's rows goes
straight home while the next step works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from ._batches import Batches, as_bytes


class Meeting(NamedTuple):
    """Own rows and another rank's, every pair of which is worked on."""

    other: int  # rank
    mine: slice  # of this rank's rows
    theirs: slice  # of the other's


def steps_of(batches: Batches, *, once: bool) -> int:
    return batches.world_size // 2 if once else batches.world_size - 1


def meeting_at(batches: Batches, rank: int, step: int, *, once: bool) -> Meeting:
    """Whom `rank` meets at a step from 1 to `steps_of`.

    Over all ranks and steps, every two rows of different ranks meet `once`, or once on either side. Where
    they meet once and the number of ranks is even, the two that meet at the last step share its pairs: each
    works on half of the rows of the lower of the two.
    """
    other = (rank - step) % batches.world_size
    mine, theirs = slice(0, batches.sizes[rank]), slice(0, batches.sizes[other])
    if once and 2 * step == batches.world_size:
        half = (batches.sizes[min(rank, other)] + 1) // 2
        if rank < other:
            mine = slice(0, half)
        else:
            theirs = slice(half, batches.sizes[other])
    return Meeting(other, mine, theirs)


def go_round(
    x: Tensor,
    batches: Batches,
    visit: Callable[[Meeting, Tensor], Sequence[Tensor]],
    expect: Callable[[int], Sequence[Tensor]] = lambda _: (),
    collect: Callable[[int, slice, Sequence[Tensor]], None] = lambda *_: None,
    *,
    once: bool,
) -> None:
    """Works on all meetings of this rank; every rank calls it. x [n, D] is contiguous.

    visit(meeting, rows [theirs, D]) works on one and returns what it found about their rows, which goes to
    collect(other, mine, tensors) there: what `other` has found about `mine` of this rank's rows. Expected are
    tensors like those of expect(len(mine)). Calls come in the order of the steps.
    """
    rank, world = batches.rank, batches.world_size
    steps = steps_of(batches, once=once)
    if steps == 0:
        return

    def block_of(step: int) -> Tensor:
        return x.new_empty(batches.sizes[(rank - step) % world], x.shape[1])

    block, following = x, block_of(1)
    travelling = _exchange(batches, block, rank + 1, following, rank - 1)
    returning: tuple[list[dist.Work], int, slice, Sequence[Tensor], Sequence[Tensor]] | None = None

    def take() -> None:
        if returning is not None:
            works, other, mine, received, _sent = returning
            _wait(works)
            collect(other, mine, received)

    for step in range(1, steps + 1):
        _wait(travelling)
        block = following
        if step < steps:
            following = block_of(step + 1)
            travelling = _exchange(batches, block, rank + 1, following, rank - 1)
        meeting = meeting_at(batches, rank, step, once=once)
        found = [t.contiguous() for t in visit(meeting, block[meeting.theirs])]
        take()
        host = (rank + step) % world
        mine = meeting_at(batches, host, step, once=once).theirs
        received = expect(mine.stop - mine.start)
        works = [
            work
            for sent, empty in zip(found, received, strict=True)
            for work in _exchange(batches, sent, meeting.other, empty, host)
        ]
        returning = works, host, mine, received, found
    take()


def _exchange(batches: Batches, sent: Tensor, to: int, received: Tensor, origin: int) -> list[dist.Work]:
    """Starts to send one tensor and to receive another; both contiguous. Empty ones do not travel."""
    world, operations = batches.world_size, []
    if sent.numel():
        peer = to % world
        operations.append(dist.P2POp(dist.isend, as_bytes(sent), group=batches.group, group_peer=peer))
    if received.numel():
        peer = origin % world
        operations.append(dist.P2POp(dist.irecv, as_bytes(received), group=batches.group, group_peer=peer))
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
