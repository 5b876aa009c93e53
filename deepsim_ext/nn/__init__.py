"""The losses as modules: options at construction, tensors in `forward`. And the heads of Siamese networks."""

from __future__ import annotations

from .embeddings import (
    BatchAllTripletLoss,
    BatchContrastiveLoss,
    BatchHardTripletLoss,
    BatchSemiHardTripletLoss,
    ContrastiveLoss,
    TripletMarginLoss,
)
from .heads import L2Normalize, SiameseDistance, SiameseHead
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
    "L2Normalize",
    "SiameseDistance",
    "SiameseHead",
    "StyleLoss",
    "StyleTransferLoss",
    "TotalVariationLoss",
    "TripletMarginLoss",
]
