"""What is returned besides a plain tensor; everything is on the device of the embeddings or features.

Only losses carry a gradient. Counts are int64, other statistics have the loss's dtype. With a NaN or inf in
an embedding the loss and all means are NaN, and the counts mean nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TripletLossResult(NamedTuple):
    """A triplet loss with statistics of its triplets.

    The triplets are those that the loss looks at: the hardest one of every valid anchor for batch-hard, one
    for every ordered pair (anchor, positive) for semi-hard, all of them for batch-all, and those inside the
    margin for semi-hard by the definition "pml".
    """

    loss: Tensor  # scalar, or [N] for reduction="none"
    valid_anchors: Tensor  # scalar: anchors that have a positive and a negative
    triplets: Tensor  # scalar: how many triplets there are
    active_triplets: Tensor  # scalar: how many of them have a loss > 0
    active_fraction: Tensor  # scalar: active_triplets / triplets; 0 if there are none
    mean_d_ap: Tensor  # scalar: mean over triplets of the positive's distance; 0 if there are none
    mean_d_an: Tensor  # scalar: mean over triplets of the negative's distance; 0 if there are none


class ContrastiveResult(NamedTuple):
    """A contrastive loss over a batch with statistics of its ordered pairs."""

    loss: Tensor  # scalar
    positive_pairs: Tensor  # scalar: pairs of one label
    negative_pairs: Tensor  # scalar: pairs of two labels
    active_positive_pairs: Tensor  # scalar: positive pairs whose loss is > 0
    active_negative_pairs: Tensor  # scalar: negative pairs whose loss is > 0
    mean_d_positive: Tensor  # scalar: mean distance of positive pairs; 0 if there are none
    mean_d_negative: Tensor  # scalar: mean distance of negative pairs; 0 if there are none


class NearestNeighbors(NamedTuple):
    """The k nearest rows of every query, nearest first; neither carries a gradient."""

    distances: Tensor  # [Q, k], ascending; NaN where an input was NaN or inf
    indices: Tensor  # int64 [Q, k]; -1 where an input was NaN or inf


class StyleTransferResult(NamedTuple):
    """The loss of a style transfer and its terms, which are scalars times their weights and add up to it."""

    loss: Tensor
    content: Tensor
    style: Tensor
    total_variation: Tensor
