"""All ranks of a process group go into a call together, or none does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from .._checks.texts import error

Checked = TypeVar("Checked")


def group_of(function: str, group: ProcessGroup | None) -> ProcessGroup | None:
    """`group` or, for None, the default group; None where that is of one process or not initialised."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    if not isinstance(group, ProcessGroup):  # torch gives those who are not in a new group a stand-in
        got = type(group).__name__
        raise error(TypeError, function, "process_group", "None or a group that this rank is in", got)
    return group if dist.get_world_size(group) > 1 else None


def agree(
    function: str,
    group: ProcessGroup | None,
    argument: str,
    check: Callable[[], tuple[Checked, Hashable, Hashable]],
) -> tuple[Checked, list[Hashable]]:
    """Runs `check` on every rank and raises on all of them if it raises on one, or if they do not agree.

    `check` returns (result, common, own): `common` has to be the same on all ranks, else they raise a
    ValueError about `argument`. Where `check` raises, its error is raised on that rank, and a RuntimeError
    with the number of the rank and its words on the others.

    Returns (result, `own` by rank). One exchange of small objects, which on CUDA waits for the device; none
    without a group.
    """
    if group is None:
        checked, _, own = check()
        return checked, [own]
    problem, checked, common, own = None, None, None, None
    try:
        checked, common, own = check()
    except Exception as caught:  # of whatever kind: the other ranks wait for a word
        problem = caught
    words = None if problem is None else f"{type(problem).__name__}: {problem}"
    said: list[tuple[str | None, Hashable, Hashable]] = [(None, None, None)] * dist.get_world_size(group)
    dist.all_gather_object(said, (words, common, own), group)
    if problem is not None:
        raise problem
    for rank, (words, _, _) in enumerate(said):
        if words is not None:
            raise RuntimeError(f"{function}: rank {rank} failed: {words}")
    for rank, (_, other, _) in enumerate(said):
        if other != said[0][1]:
            expected = f"the same on all ranks, {said[0][1]} as on rank 0"
            raise error(ValueError, function, argument, expected, f"{other} on rank {rank}")
    return checked, [own for _, _, own in said]
