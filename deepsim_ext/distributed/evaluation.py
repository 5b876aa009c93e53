"""Retrieval metrics of embeddings that are spread over all ranks of a process group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks.options import flag
from .._mapped_rows import Source
from .._progress import progress_bar
from .._row_sources import RowSource, prepare_metrics, row_source
from ..evaluation import RetrievalMetrics, count_matches, scores_of_all, summary
from ._agree import agree, group_of
from ._batches import Batches, gather_rows, kind_of
from ._shards import Shards


@torch.no_grad()
def retrieval_metrics(
    embeddings: Tensor | Source,
    labels: Tensor,
    ref_embeddings: Tensor | Source | None = None,
    ref_labels: Tensor | None = None,
    *,
    recall_at: tuple[int, ...] = (1, 2, 4, 8),
    distance: str = "euclidean",
    avg_of_avgs: bool = False,
    process_group: ProcessGroup | None = None,
    chunk_rows: int | None = None,
    progress: bool = False,
) -> RetrievalMetrics:
    """`deepsim_ext.evaluation.retrieval_metrics` of all ranks' rows, against all ranks' references.

    Every rank calls it with rows of its own, of any number, also none; a label means the same on all ranks.
    The union has its rows in the order of the ranks, which is what decides between equal distances. The
    numbers are those of one process with all rows, and the same on every rank. Rows stay where they are:
    queries are gathered, up to 8,192 of each rank at a time, and every rank looks for them in, or reads from
    disk, its references once. Memory is O(n D) for tensors, some three chunks for files, a workspace, and 48
    bytes for each row of all ranks.

    Args:
        embeddings: [n, D], a tensor of float32, float64, bfloat16 or float16 or, as in `deepsim_ext.mapped`,
            a .npy file or an array. Finite.
        labels: int64 [n]. Arithmetic is done on their device.
        ref_embeddings: likewise [m, D]. None, or `embeddings` itself, on all ranks: the other rows of all
            ranks' `embeddings`, where no row is its own reference.
        ref_labels: int64 [m], given together with `ref_embeddings`.
        recall_at, distance, avg_of_avgs: as in `deepsim_ext.evaluation.retrieval_metrics`.
        process_group: None for the default group; without one that is initialised, and in a group of one,
            there are only this rank's rows.
        chunk_rows: rows that are read from disk at a time. None: as many as take 8 MiB in the arithmetic.
        progress: show a bar of this rank's queries done, by tqdm, which comes with `deepsim-ext[eval]`.

    Raises:
        ImportError, TypeError, ValueError: as `deepsim_ext.mapped.retrieval_metrics` on this rank, and on all
            ranks where D, dtypes, kinds of device or options are not the same.
        RuntimeError: another rank's arguments are wrong, or its files; names the rank.
    """
    function = "retrieval_metrics"
    group = group_of(function, process_group)

    def check() -> tuple[tuple[RowSource, RowSource | None, list[int]], str, tuple[int, int]]:
        x, refs, ks = prepare_metrics(
            function,
            embeddings,
            labels,
            ref_embeddings,
            ref_labels,
            source=row_source,
            recall_at=recall_at,
            distance=distance,
            avg_of_avgs=avg_of_avgs,
            chunk_rows=chunk_rows,
        )
        flag(function, "progress", progress)
        options = {"recall_at": ks, "distance": distance, "avg_of_avgs": avg_of_avgs}
        kind = "their own" if refs is None else "other"
        common = f"{kind_of(x[labels[:0]])} with {kind} references for {options}"
        return (x, refs, ks), common, (len(x), len(x if refs is None else refs))

    (x, refs, ks), found = agree(function, group, "embeddings", check)
    counts, sizes = zip(*found, strict=True)
    queries, parts = (Batches.of_ranks(group, n, labels.device) for n in (counts, sizes))
    own = refs is None
    if own:
        refs, ref_labels = x, labels
    references = Shards(function, refs.references(ref_labels, distance, parts.offset), parts)
    all_ref_labels = gather_rows(ref_labels, parts)
    matches = count_matches(labels, all_ref_labels, own=own)
    with progress_bar(function, progress, int((matches > 0).sum()), "query") as advance:
        scores = scores_of_all(
            x,
            labels,
            matches,
            references,
            all_ref_labels,
            first=parts.offset if own else None,
            in_step=references.in_step,
            advance=advance,
        )
    everyone = (gather_rows(t, queries) for t in (scores, matches, labels))
    return summary(*everyone, recall_at=ks, avg_of_avgs=avg_of_avgs)
