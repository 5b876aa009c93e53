"""Verification: are these two the same? Thresholds, the LFW protocol, ROC curves, pairs and their files.

Needs the extra `deepsim-ext[eval]` where curves, confidence intervals and plots are made; its packages are
imported only there.
"""

from __future__ import annotations

from .curves import eer, roc, tar_at_far
from .decisions import best_threshold, verify
from .files import load_embeddings, load_labels, read_pairs
from .lfw import lfw_files, read_lfw_pairs
from .pairs import all_pairs, balanced_pairs, hardest_pairs, pair_distances
from .protocols import kfold_accuracy, val_at_far
from .results import (
    BestThreshold,
    EqualErrorRate,
    KFoldAccuracy,
    LabelledPairs,
    LfwPairs,
    RocCurve,
    TrueAcceptRates,
    ValidationRate,
)

__all__ = [
    "BestThreshold",
    "EqualErrorRate",
    "KFoldAccuracy",
    "LabelledPairs",
    "LfwPairs",
    "RocCurve",
    "TrueAcceptRates",
    "ValidationRate",
    "all_pairs",
    "balanced_pairs",
    "best_threshold",
    "eer",
    "hardest_pairs",
    "kfold_accuracy",
    "lfw_files",
    "load_embeddings",
    "load_labels",
    "pair_distances",
    "read_lfw_pairs",
    "read_pairs",
    "roc",
    "tar_at_far",
    "val_at_far",
    "verify",
]
