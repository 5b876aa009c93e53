"""Distances of all pairs of a label: what losses over the batches of several processes begin with."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, reference


def positive_distances(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    center: Tensor | None = None,
    distance: str = "euclidean",
) -> Tensor:
    """Of every row and every row of its label, as the search for negatives measures them.

    A negative that is equal to a positive has the same distance from the anchor as this one, to the last bit,
    where `semi_hard_negatives` or `batch_all_negatives` is given the same centre.

    Args:
        embeddings, labels: [N, D] and int64 [N].
        ref_embeddings, ref_labels: [M, D] in the dtype of `embeddings` and int64 [M]. None: the other rows of
            the batch.
        center, distance: as in `semi_hard_negatives`.

    Returns:
        [P], float32 or, for float64 embeddings, float64, ascending by row, then by the other row's index. NaN
        throughout for a NaN or inf in the rows, or rows too long for their squares.

    Raises:
        TypeError: a wrong dtype.
        ValueError: unknown distance, or shapes or devices that do not go together.
    """
    arguments = (embeddings, labels, ref_embeddings, ref_labels, center, distance)
    return torch.ops.deepsim_ext.positive_distances(*arguments)


@torch.library.register_fake("deepsim_ext::positive_distances")
def _(embeddings, labels, ref_embeddings, ref_labels, center, distance):
    pairs = torch.library.get_ctx().new_dynamic_size()
    return embeddings.new_empty(pairs, dtype=_checks.compute_dtype(embeddings))


torch.library.impl("deepsim_ext::positive_distances", "cuda", reference.positive_distances)
