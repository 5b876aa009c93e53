"""The hardest pairs of a block of rows: what batch-hard mining over several processes begins with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks


class Extremes(NamedTuple):
    """Of every row, positives [0] and negatives [1]; what there is none of is -1, at -inf and inf."""

    half_squares: Tensor  # [2, N]: the largest |a - b|^2 / 2 to a positive, the smallest to a negative
    indices: Tensor  # int32 [2, N]: to whom, the lowest of equals
    # [N]: |a - center|^2 / 2, of which half squares may have lost digits; on CUDA |a|^2 / 2 of 16-bit rows,
    # which are not shifted, and 0 of float64, where distances are sums of differences.
    half_norms: Tensor
    ref_half_squares: Tensor  # [2, M], for every row of the reference set, as above
    ref_indices: Tensor  # int32 [2, M]


def batch_hard_extremes(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    center: Tensor,
    distance: str = "euclidean",
) -> Extremes:
    """Of every row the farthest positive and the nearest negative, as tiles of distances have them.

    A pair has the same value in every block that is given the same centre.

    Args:
        embeddings, labels: [N, D] and int64 [N].
        ref_embeddings, ref_labels: [M, D] in the dtype of `embeddings` and int64 [M]. None: the other rows of
            the batch; there are no results for a reference set then.
        center: float64 [D] near the rows, or for cosine distance near their directions (0 if any row of any
            block has none): tiles subtract it from both.
        distance: "euclidean", "sqeuclidean", or "cosine", of which half squares are 1 - cos.

    Raises:
        TypeError: a wrong dtype.
        ValueError: unknown distance, or shapes or devices that do not go together.
    """
    arguments = (embeddings, labels, ref_embeddings, ref_labels, center, distance)
    return Extremes(*torch.ops.deepsim_ext.batch_hard_extremes(*arguments))


@torch.library.register_fake("deepsim_ext::batch_hard_extremes")
def _(embeddings, labels, ref_embeddings, ref_labels, center, distance):
    rows, refs = embeddings.shape[0], 0 if ref_embeddings is None else ref_embeddings.shape[0]
    values = [embeddings.new_empty((2, n), dtype=_checks.compute_dtype(embeddings)) for n in (rows, refs)]
    indices = [torch.empty_like(v, dtype=torch.int32) for v in values]
    return values[0], indices[0], torch.empty_like(values[0][0]), values[1], indices[1]
