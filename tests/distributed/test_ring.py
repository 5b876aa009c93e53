"""Who meets whom on the ring, without processes."""

from __future__ import annotations

import itertools

import pytest
import torch

from deepsim_ext.distributed._batches import Batches
from deepsim_ext.distributed._ring import meeting_at, steps_of


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("world_size", range(2, 10))
def test_every_two_rows_of_different_ranks_meet(world_size: int, once: bool) -> None:
    sizes = tuple((5 * k + 3) % 7 for k in range(world_size))
    ends = (0, *itertools.accumulate(sizes))
    met = torch.zeros(ends[-1], ends[-1], dtype=torch.int64)
    for rank in range(world_size):
        batches = Batches(None, rank, sizes, ends, None, False)
        for step in range(1, steps_of(batches, once=once) + 1):
            meeting = meeting_at(batches, rank, step, once=once)
            mine = torch.arange(ends[rank], ends[rank + 1])[meeting.mine]
            theirs = torch.arange(ends[meeting.other], ends[meeting.other + 1])[meeting.theirs]
            met[mine[:, None], theirs] += 1
    rank_of = torch.repeat_interleave(torch.arange(world_size), torch.tensor(sizes))
    expected = (rank_of[:, None] != rank_of).long()
    assert (met + met.T if once else met).equal(expected)


def test_work_is_shared_out_evenly() -> None:
    for world_size in range(2, 10):
        sizes = (8,) * world_size
        work = []
        for rank in range(world_size):
            batches = Batches(None, rank, sizes, (0, *itertools.accumulate(sizes)), None, False)
            steps = range(1, steps_of(batches, once=True) + 1)
            meetings = [meeting_at(batches, rank, step, once=True) for step in steps]
            work.append(
                sum((m.mine.stop - m.mine.start) * (m.theirs.stop - m.theirs.start) for m in meetings)
            )
        assert len(set(work)) == 1
