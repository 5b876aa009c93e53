"""Distances of all pairs of a label, a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import compute_dtype
from .distances import pairwise
from .given_lists import WORKSPACE, comparable


@torch.no_grad()
def positive_distances(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    center: Tensor | None,
    distance: str,
) -> Tensor:
    """Of every row and every row of its label in the reference set or, without one, every other row.

    Arguments and result are those of `deepsim_ext.positive_distances.positive_distances`; memory beyond them
    is 2^20 distances. Differences need no `center`.
    """
    self_form = ref_embeddings is None
    refs, ref_labels = (embeddings, labels) if self_form else (ref_embeddings, ref_labels)
    dtype = compute_dtype(embeddings)
    parts = [embeddings.new_empty(0, dtype=dtype)]
    size = max(1, WORKSPACE // max(1, len(refs)))
    for start in range(0, len(embeddings), size):
        rows = slice(start, start + size)
        same = labels[rows, None] == ref_labels
        if self_form:
            same.diagonal(start).fill_(False)
        parts.append(pairwise(embeddings[rows].to(dtype), refs.to(dtype), distance)[same])
    return torch.where(comparable(embeddings, refs, distance), torch.cat(parts), torch.nan)
