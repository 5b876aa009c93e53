"""What a block of rows adds to a batch-all loss over the batches of several processes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def batch_all_negatives(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor,
    ref_labels: Tensor,
    begin: Tensor,
    positives: Tensor,
    *,
    margin: float,
    semi_hard: bool = False,
    center: Tensor | None = None,
    distance: str = "euclidean",
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Triplets of anchors that bring the distances of their positives, and the negatives in a block of rows.

    Source: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017), eq.
    6. The loss is the sum over positives of active (d_ap + margin), less the sum of d_an over active
    triplets; sums over several blocks are those over all. Memory is O(N + M + P) beyond copies of the rows
    and their gradients.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, begin, positives, center, distance: as in
            `semi_hard_negatives`.
        margin: in units of the distance.
        semi_hard: only triplets with d_ap < d_an <= d_ap + margin.
        with_gradient: whether gradients are wanted.

    Returns:
        (sums, active, grad_embeddings, grad_ref_embeddings): float64 [4], how many triplets there are, how
        many with a loss > 0, and the sums of d_an over either; [P], for every positive how many of its
        triplets have a loss > 0; [N, D] and [M, D], the gradients of minus the last sum, or no rows.
        All but `sums` are in the dtype of `positives`. NaN throughout for a NaN or inf in the rows, rows too
        long for their squares, or a positive that is NaN or beyond half of its dtype's largest number.

    Raises:
        TypeError: a wrong dtype.
        ValueError: unknown distance, or shapes, devices or lists that do not go together.
    """
    block = (embeddings, labels, ref_embeddings, ref_labels, begin, positives)
    return torch.ops.deepsim_ext.batch_all_negatives(
        *block, margin, semi_hard, center, distance, with_gradient
    )


@torch.library.register_fake("deepsim_ext::batch_all_negatives")
def _(
    embeddings,
    labels,
    ref_embeddings,
    ref_labels,
    begin,
    positives,
    margin,
    semi_hard,
    center,
    distance,
    with_gradient,
):
    def like(x: Tensor) -> Tensor:
        return positives.new_empty((x.shape[0] if with_gradient else 0, x.shape[1]))

    sums = positives.new_empty(4, dtype=torch.float64)
    return sums, torch.empty_like(positives), like(embeddings), like(ref_embeddings)


torch.library.impl("deepsim_ext::batch_all_negatives", "cuda", reference.batch_all_negatives)
