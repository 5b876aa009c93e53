"""Retrieval metrics and NMI."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .batch import batch_hard
from .options import flag, integer_in, positive_integer
from .tensors import check_embeddings, check_labels, compute_dtype
from .texts import describe, error


class RetrievalArguments(NamedTuple):
    embeddings: Tensor  # [N, D], dtype of the arithmetic
    labels: Tensor  # int64 [N]
    ref_embeddings: Tensor | None  # [M, D]; None: the self form, no row its own reference
    ref_labels: Tensor | None  # int64 [M]; None: the self form
    recall_at: list[int]


def retrieval_metrics(
    function: str,
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    *,
    recall_at: tuple[int, ...],
    distance: str,
    avg_of_avgs: bool,
) -> RetrievalArguments:
    """All arguments of retrieval_metrics."""
    flag(function, "avg_of_avgs", avg_of_avgs)
    if not isinstance(recall_at, list | tuple):
        expected = "a list or tuple of integers >= 1"
        raise error(TypeError, function, "recall_at", expected, describe(recall_at))
    ks = [positive_integer(function, f"recall_at[{i}]", k) for i, k in enumerate(recall_at)]
    x, labels, references, ref_labels = batch_hard(
        function, embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    dtype = compute_dtype(x)
    references = None if references is None else references.to(dtype)
    return RetrievalArguments(x.to(dtype), labels, references, ref_labels, ks)


def nmi(function: str, embeddings: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, int]:
    """All arguments of nmi; returns embeddings in the dtype of the arithmetic, and the seed."""
    check_embeddings(function, "embeddings", embeddings, "[N, D]")
    if not len(embeddings):
        raise error(ValueError, function, "embeddings", "of at least one row", describe(embeddings))
    check_labels(function, "labels", labels, "N", "embeddings", embeddings)
    seed = integer_in(function, "seed", seed, 0, 2**32 - 1)
    return embeddings.to(compute_dtype(embeddings)), seed
