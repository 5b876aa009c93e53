"""What the losses return besides a plain tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BatchHardResult(NamedTuple):
    """Batch-hard triplet loss with statistics of its mining; all on the device of the embeddings.

    Only `loss` carries a gradient. The floating statistics have the loss's dtype.
    """

    loss: Tensor  # scalar, or [N] for reduction="none"
    valid_anchors: Tensor  # int64 scalar: anchors that have a positive and a negative
    active_fraction: Tensor  # scalar: share of the valid anchors whose loss is > 0; 0 if there are none
    mean_d_ap: Tensor  # scalar: mean over valid anchors of the hardest positive's distance; 0 if none
    mean_d_an: Tensor  # scalar: mean over valid anchors of the hardest negative's distance; 0 if none
