"""Semi-hard negatives of a block of rows: what losses over the batches of several processes are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def semi_hard_negatives(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor,
    ref_labels: Tensor,
    begin: Tensor,
    positives: Tensor,
    *,
    center: Tensor | None = None,
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For anchors with the distances of their positives: which rows of a block are farther, and nearest.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet" (2015), section 3.2. The positives may be of other
    blocks; the best over several blocks is the best over all. Memory is O(N + M + P) beyond copies of the
    rows.

    Args:
        embeddings, labels: the anchors, [N, D] and int64 [N].
        ref_embeddings, ref_labels: the block, [M, D] in the dtype of `embeddings` and int64 [M]. Rows of an
            anchor's label are no negatives of it.
        begin: int64 [N + 1], ascending from 0 to P: the list of anchor a is
            positives[begin[a] : begin[a + 1]].
        positives: [P], distances in any order; float32, or float64 for float64 embeddings. -1 asks for the
            nearest negative of all.
        center: float64 [D], what rows (for cosine distance, unit vectors) are shifted by before their
            distances are taken, or None for their means. With the same centre two rows have the same distance
            in every block; for cosine distance it has to be 0 if any block has a zero row.
        distance: "euclidean", "sqeuclidean" or "cosine".

    Returns:
        (nearest, nearest_index, farthest, farthest_index): [P] and int32 [P], the nearest negative that is
        farther than the positive and its distance, inf and -1 where there is none; [N] and int32 [N], the
        anchor's farthest negative, -inf and -1 where there is none. The lowest index on ties. Distances are
        in the dtype of `positives`. A NaN or inf in the rows, rows too long for their squares, or a NaN in
        `positives` make all distances NaN and all indices -1.

    Raises:
        TypeError: a wrong dtype.
        ValueError: unknown distance, or shapes, devices or lists that do not go together.
    """
    arguments = (embeddings, labels, ref_embeddings, ref_labels, begin, positives, center, distance)
    return torch.ops.deepsim_ext.semi_hard_negatives(*arguments)


@torch.library.register_fake("deepsim_ext::semi_hard_negatives")
def _(embeddings, labels, ref_embeddings, ref_labels, begin, positives, center, distance):
    farthest = positives.new_empty(embeddings.shape[0])
    nearest_index, farthest_index = (torch.empty_like(t, dtype=torch.int32) for t in (positives, farthest))
    return torch.empty_like(positives), nearest_index, farthest, farthest_index


torch.library.impl("deepsim_ext::semi_hard_negatives", "cuda", reference.semi_hard_negatives)
