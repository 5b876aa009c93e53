"""Runs a function on several ranks of a gloo group, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "deepsim_ext.distributed"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """function(rank, *args) on ranks 0 to world_size - 1; what each returned, by rank.

    function is one of a module, everything is pickled. Exceptions of ranks come back as an AssertionError
    with all tracebacks; after `timeout` seconds the processes are killed and it is a TimeoutError.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = _context.Queue()
        processes = [
            _context.Process(
                target=_run, args=(rank, world_size, folder, timeout, results, function, args), daemon=True
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(processes: list[Any], results: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    problems: dict[int, str] = {}
    while len(found) + len(problems) < len(processes):
        silent = set(range(len(processes))) - set(found) - set(problems)
        dead = {
            r: f"ended with exit code {code}" for r in silent if (code := processes[r].exitcode) is not None
        }
        try:  # what those that are dead said before comes first
            rank, problem, result = results.get(timeout=0.2)
        except queue.Empty:
            problems |= dead
            if time.monotonic() > deadline and not dead:
                raise TimeoutError(f"ranks {sorted(silent)} have not finished, {problems}") from None
            continue
        if problem is None:
            found[rank] = pickle.loads(result)
        else:
            problems[rank] = problem
    assert not problems, "\n".join(f"rank {rank}: {problem}" for rank, problem in sorted(problems.items()))
    return [found[rank] for rank in range(len(processes))]


def _run(
    rank: int, world_size: int, folder: str, timeout: float, results: Any, function: Any, args: Any
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{Path(folder) / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(rank, *args)
        with suppress(RuntimeError):  # some rank is gone: not this one's fault
            dist.barrier()
        results.put((rank, None, pickle.dumps(result)))
        dist.destroy_process_group()
    except BaseException:  # the parent is to see it whatever it is
        results.put((rank, traceback.format_exc(), None))
