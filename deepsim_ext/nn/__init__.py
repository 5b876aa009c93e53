"""The losses as modules: options at construction, tensors in `forward`."""

from __future__ import annotations

from .embeddings import (
    BatchAllTripletLoss,
    BatchContrastiveLoss,
    BatchHardTripletLoss,
    BatchSemiHardTripletLoss,
    ContrastiveLoss,
    TripletMarginLoss,
)
from .memory import CrossBatchMemory
from .style import ContentLoss, GramMatrix, StyleLoss, TotalVariationLoss
from .style_transfer import StyleTransferLoss

__all__ = [
    "BatchAllTripletLoss",
    "BatchContrastiveLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
    "ContentLoss",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "GramMatrix",
    "StyleLoss",
    "StyleTransferLoss",
    "TotalVariationLoss",
    "TripletMarginLoss",
]
