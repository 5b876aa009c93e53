"""Argument checks shared by the compiled functions and the reference, so that both raise the same errors.

One call per public function checks everything and returns the arguments in the form that implementations work
on. Every error reads `function: argument must be <expected>, got <what>`: TypeError for a wrong Python type,
tensor layout or dtype, ValueError for a wrong value, shape or device. Checks look at types, dtypes, shapes
and devices, never at a tensor's values, and put sizes into texts only when they raise: they cost no device
sync and trace under torch.compile(fullgraph=True) with dynamic shapes, under vmap and with fake tensors.
"""

from __future__ import annotations

from .batch import (
    MINING_STRATEGIES,
    SEMI_HARD_DEFINITIONS,
    BatchHardArguments,
    batch_all_options,
    batch_contrastive_options,
    batch_hard,
    batch_hard_options,
    cross_batch_memory,
    cross_batch_memory_options,
    mining_strategies,
    semi_hard_options,
)
from .grad_cache import cached_backward, chunk_embeddings, loss_value, trained_embeddings, unrelated_loss
from .layers import (
    GRAM_DISTANCES,
    GRAM_NORMALIZATIONS,
    LAYER_REDUCTIONS,
    VARIATION_DISTANCES,
    VARIATION_REDUCTIONS,
    ContentLayer,
    StyleLayer,
    check_features,
    content,
    content_options,
    gram_matrix,
    gram_normalization,
    layer_weights,
    style,
    style_options,
    total_variation,
    total_variation_options,
)
from .options import (
    BATCH_REDUCTIONS,
    DISTANCES,
    PAIR_REDUCTIONS,
    TRIPLET_REDUCTIONS,
    choice,
    flag,
    margin_value,
)
from .rows import (
    MAX_NEIGHBORS,
    NeighborArguments,
    TripletArguments,
    contrastive,
    contrastive_options,
    nearest_neighbors,
    triplet_margin,
    triplet_margin_options,
)
from .tensors import FLOAT_DTYPES, INTEGER_DTYPES, compute_dtype

__all__ = [
    "BATCH_REDUCTIONS",
    "DISTANCES",
    "FLOAT_DTYPES",
    "GRAM_DISTANCES",
    "GRAM_NORMALIZATIONS",
    "INTEGER_DTYPES",
    "LAYER_REDUCTIONS",
    "MAX_NEIGHBORS",
    "MINING_STRATEGIES",
    "PAIR_REDUCTIONS",
    "SEMI_HARD_DEFINITIONS",
    "TRIPLET_REDUCTIONS",
    "VARIATION_DISTANCES",
    "VARIATION_REDUCTIONS",
    "BatchHardArguments",
    "ContentLayer",
    "NeighborArguments",
    "StyleLayer",
    "TripletArguments",
    "batch_all_options",
    "batch_contrastive_options",
    "batch_hard",
    "batch_hard_options",
    "cached_backward",
    "check_features",
    "choice",
    "chunk_embeddings",
    "compute_dtype",
    "content",
    "content_options",
    "contrastive",
    "contrastive_options",
    "cross_batch_memory",
    "cross_batch_memory_options",
    "flag",
    "gram_matrix",
    "gram_normalization",
    "layer_weights",
    "loss_value",
    "margin_value",
    "mining_strategies",
    "nearest_neighbors",
    "semi_hard_options",
    "style",
    "style_options",
    "total_variation",
    "total_variation_options",
    "trained_embeddings",
    "triplet_margin",
    "triplet_margin_options",
    "unrelated_loss",
]
