"""Neighbours and retrieval metrics of embeddings on disk, which may be larger than memory.

As `deepsim_ext.nearest_neighbors` and `deepsim_ext.evaluation.retrieval_metrics`, with .npy files, or the
arrays that NumPy maps them to, in place of tensors; they are read chunk by chunk. float16, float32 and
float64 in C order, so whole rows follow one another; what `np.save` writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks.options import integer_in
from ._mapped_rows import MappedRows, Source
from ._progress import progress_bar
from ._row_sources import prepare_metrics, prepare_search
from .evaluation import RetrievalMetrics, count_matches, scores_of_all, summary
from .results import NearestNeighbors


@torch.no_grad()
def nearest_neighbors(
    queries: Tensor,
    gallery: Source,
    k: int,
    *,
    distance: str = "euclidean",
    chunk_rows: int | None = None,
    progress: bool = False,
) -> NearestNeighbors:
    """The k nearest rows of a gallery on disk for every row of `queries`, nearest first.

    As `deepsim_ext.nearest_neighbors` finds them in one piece, whatever the size of chunks; where distances
    are equal those of lowest index, at the last place, too. The gallery is read once. Memory is O(Q k), a
    copy of the queries and some three chunks.

    Args:
        queries: [Q, D] with D >= 1; float32, float64, bfloat16 or float16. Finite.
        gallery: path of a .npy file or an array, [G, D]; float16, float32 or float64 in C order. Finite.
        k: an integer from 1 to G.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).
        chunk_rows: rows that are read at a time. None: as many as take 8 MiB in the arithmetic.
        progress: show a bar of the rows searched, by tqdm, which comes with `deepsim-ext[eval]`.

    Returns:
        `NearestNeighbors` on the device of the queries: distances [Q, k], ascending, float64 if the queries
        or the gallery are, else float32, and indices int64 [Q, k], ascending among equal distances.

    Raises:
        ImportError: `progress` without tqdm.
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: a file that cannot be read, unknown distance, `k` out of range, shapes that do not go
            together, or values that are not finite or too long for their squares (1e18 in float32); for those
            of the gallery as soon as they are read.
    """
    function = "nearest_neighbors"
    rows = MappedRows(function, "gallery", gallery)
    queries, k = prepare_search(function, queries, rows, k, distance=distance, chunk_rows=chunk_rows)
    k = integer_in(function, "k", k, 1, len(rows))
    with progress_bar(function, progress, len(rows), "row") as advance:
        return rows.references(None, distance).nearest(queries, k, advance)


@torch.no_grad()
def retrieval_metrics(
    embeddings: Source,
    labels: Tensor,
    ref_embeddings: Source | None = None,
    ref_labels: Tensor | None = None,
    *,
    recall_at: tuple[int, ...] = (1, 2, 4, 8),
    distance: str = "euclidean",
    avg_of_avgs: bool = False,
    chunk_rows: int | None = None,
    progress: bool = False,
) -> RetrievalMetrics:
    """The numbers of `deepsim_ext.evaluation.retrieval_metrics`, which defines them, of embeddings on disk.

    The references are read once for every 8,192 queries with a match, or fewer where more than 128 are of a
    label: so many that k of them per query take 8 MiB. Memory is O(N + M), that workspace, and some three
    chunks.

    Args:
        embeddings: path of a .npy file or an array, [N, D]; float16, float32 or float64 in C order. Finite.
        labels: int64 [N]. Arithmetic is done on their device.
        ref_embeddings: path or array, [M, D]. None, or `embeddings` itself: the other rows of `embeddings`,
            where no row is its own reference. Arithmetic is done in float64 if either is, else in float32.
        ref_labels: int64 [M], given together with `ref_embeddings`.
        recall_at: a list or tuple of integers >= 1.
        distance: "euclidean", "sqeuclidean" or "cosine".
        avg_of_avgs: means over classes of the means over each class's queries.
        chunk_rows: rows that are read at a time. None: as many as take 8 MiB in the arithmetic.
        progress: show a bar of the queries done, by tqdm, which comes with `deepsim-ext[eval]`.

    Raises:
        ImportError: `progress` without tqdm.
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: a file that cannot be read, unknown distance, values that are not finite or too long for
            their squares, or shapes or devices that do not go together.
    """
    function = "retrieval_metrics"
    x, refs, recall_at = prepare_metrics(
        function,
        embeddings,
        labels,
        ref_embeddings,
        ref_labels,
        source=MappedRows,
        recall_at=recall_at,
        distance=distance,
        avg_of_avgs=avg_of_avgs,
        chunk_rows=chunk_rows,
    )
    own = refs is None
    if own:
        refs, ref_labels = x, labels
    matches = count_matches(labels, ref_labels, own=own)
    with progress_bar(function, progress, int((matches > 0).sum()), "query") as advance:
        references = refs.references(ref_labels, distance)
        first = 0 if own else None
        scores = scores_of_all(x, labels, matches, references, ref_labels, first=first, advance=advance)
    return summary(scores, matches, labels, recall_at=recall_at, avg_of_avgs=avg_of_avgs)
