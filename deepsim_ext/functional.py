"""All functions of the package by name."""

from __future__ import annotations

from .batch_hard import batch_hard_mine, batch_hard_triplet_loss
from .content import content_loss
from .contrastive import contrastive_loss
from .gram import gram_matrix, style_loss

__all__ = [
    "batch_hard_mine",
    "batch_hard_triplet_loss",
    "content_loss",
    "contrastive_loss",
    "gram_matrix",
    "style_loss",
]
