"""All functions of the package by name."""

from __future__ import annotations

from .batch_all import batch_all_triplet_loss
from .batch_contrastive import batch_contrastive_loss
from .batch_hard import batch_hard_mine, batch_hard_triplet_loss
from .batch_semi_hard import batch_semi_hard_triplet_loss
from .content import content_loss
from .contrastive import contrastive_loss
from .gram import gram_matrix
from .nearest_neighbors import nearest_neighbors
from .style import style_loss
from .total_variation import total_variation_loss
from .triplet_margin import triplet_margin_loss

__all__ = [
    "batch_all_triplet_loss",
    "batch_contrastive_loss",
    "batch_hard_mine",
    "batch_hard_triplet_loss",
    "batch_semi_hard_triplet_loss",
    "content_loss",
    "contrastive_loss",
    "gram_matrix",
    "nearest_neighbors",
    "style_loss",
    "total_variation_loss",
    "triplet_margin_loss",
]
