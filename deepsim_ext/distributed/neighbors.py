"""Nearest neighbours in a gallery that is spread over all ranks of a process group."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks.options import flag, integer_in
from .._mapped_rows import Source
from .._nearest_rows import WORKSPACE
from .._progress import progress_bar
from .._row_sources import RowSource, prepare_search, row_source
from ..results import NearestNeighbors
from ._agree import agree, group_of
from ._batches import Batches, kind_of
from ._shards import Shards


@torch.no_grad()
def nearest_neighbors(
    queries: Tensor,
    gallery: Tensor | Source,
    k: int,
    *,
    distance: str = "euclidean",
    process_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    progress: bool = False,
) -> NearestNeighbors:
    """The k nearest rows of all ranks' galleries for every row of this rank's `queries`, nearest first.

    Every rank calls it with queries and a part of the gallery of its own, of any number of rows, also none.
    The gallery has its rows in the order of the ranks, and so numbers them; the answers are those that one
    process has with all of it. Parts stay where they are: queries are gathered, as many at a time as take
    8 MiB for what is found, and each part is searched, or read from disk, once for these.

    Args:
        queries: [q, D] with D >= 1; float32, float64, bfloat16 or float16. Finite.
        gallery: [g, D], a tensor in the dtype of the queries or, as in `deepsim_ext.mapped`, a .npy file or
            an array; of one kind on all ranks. Finite.
        k: an integer from 1 to the number of all ranks' rows; the same on all ranks.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).
        process_group: None for the default group; without one that is initialised, and in a group of one,
            there is only this rank's part.
        chunk_rows: rows that are read from disk at a time. None: as many as take 8 MiB in the arithmetic.
        progress: show a bar of this rank's rows searched, by tqdm, which comes with `deepsim-ext[eval]`.

    Returns:
        `NearestNeighbors` on the device of the queries: distances [q, k], ascending, float64 if the queries
        or the gallery are, else float32, and indices int64 [q, k] in the whole gallery, ascending among equal
        distances.

    Raises:
        ImportError, TypeError, ValueError: as `deepsim_ext.mapped.nearest_neighbors` on this rank, and on all
            ranks where D, dtypes, kinds of device or options are not the same.
        RuntimeError: another rank's arguments are wrong, or its part of the gallery; names the rank.
    """
    function = "nearest_neighbors"
    group = group_of(function, process_group)

    def check() -> tuple[tuple[Tensor, int, RowSource], str, tuple[int, int]]:
        rows = row_source(function, "gallery", gallery)
        x, own_k = prepare_search(function, queries, rows, k, distance=distance, chunk_rows=chunk_rows)
        flag(function, "progress", progress)
        common = f"{kind_of(x)}, k={own_k}, distance={distance!r}"
        return (x, own_k, rows), common, (len(x), len(rows))

    (x, k, rows), found = agree(function, group, "queries", check)
    counts, sizes = zip(*found, strict=True)
    parts = Batches.of_ranks(group, sizes, x.device)
    k = integer_in(function, "k", k, 1, sum(sizes))
    references = Shards(function, rows.references(None, distance, parts.offset), parts)
    at_a_time = max(1, WORKSPACE // (k * len(sizes)))
    rounds = math.ceil(max(counts) / at_a_time)
    neighbors = [NearestNeighbors(x.new_empty(0, k), x.new_empty(0, k, dtype=torch.int64))]
    with progress_bar(function, progress, rounds * len(rows), "row") as advance:
        for i in range(rounds):
            some = x[i * at_a_time : (i + 1) * at_a_time]
            neighbors.append(references.nearest(some, k, advance))
    return NearestNeighbors(*map(torch.cat, zip(*neighbors, strict=True)))
