"""Losses over a batch with labels, optionally against a reference set."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import (
    BATCH_REDUCTIONS,
    DISTANCES,
    TRIPLET_REDUCTIONS,
    choice,
    flag,
    margin_value,
    positive_integer,
)
from .tensors import check_columns, check_embeddings, check_labels, match_dtypes
from .texts import describe, error, short_name

MINING_STRATEGIES = ("hard", "easy", "semihard")
SEMI_HARD_DEFINITIONS = ("facenet", "tfa", "pml")


class BatchHardArguments(NamedTuple):
    embeddings: Tensor  # [N, D]
    labels: Tensor  # int64 [N]
    ref_embeddings: Tensor | None  # [M, D], dtype of embeddings; None: the self form, self-pairs excluded
    ref_labels: Tensor | None  # int64 [M]; None: the self form


def batch_hard(
    function: str,
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    *,
    distance: str,
) -> BatchHardArguments:
    """The tensors of every function over a labelled batch, and the one option that all of them have."""
    choice(function, "distance", distance, DISTANCES)
    check_embeddings(function, "embeddings", embeddings, "[N, D]")
    check_labels(function, "labels", labels, "N", "embeddings", embeddings)
    if ref_embeddings is None and ref_labels is None:
        return BatchHardArguments(embeddings, labels, None, None)
    if ref_embeddings is None:
        raise error(ValueError, function, "ref_embeddings", "given together with ref_labels", "None")
    self_form = ref_embeddings is embeddings
    check_embeddings(function, "ref_embeddings", ref_embeddings, "[M, D]")
    if ref_labels is None:
        raise error(ValueError, function, "ref_labels", "given together with ref_embeddings", "None")
    check_columns(function, "ref_embeddings", ref_embeddings, "M", "embeddings", embeddings)
    embeddings, ref_embeddings = match_dtypes(
        function, "embeddings", embeddings, "ref_embeddings", ref_embeddings, (embeddings.dtype,)
    )
    check_labels(function, "ref_labels", ref_labels, "M", "ref_embeddings", ref_embeddings)
    if self_form:
        return BatchHardArguments(embeddings, labels, None, None)
    return BatchHardArguments(embeddings, labels, ref_embeddings, ref_labels)


def mining_strategies(function: str, *, positive: str, negative: str) -> None:
    """How an anchor's positive and negative are chosen."""
    choice(function, "positive", positive, MINING_STRATEGIES)
    choice(function, "negative", negative, MINING_STRATEGIES)
    if positive == negative == "semihard":
        expected = '"hard" or "easy" with positive="semihard"'
        raise error(ValueError, function, "negative", expected, describe(negative))


def batch_hard_options(
    function: str,
    *,
    positive: str,
    negative: str,
    margin: float,
    soft: bool,
    distance: str,
    reduction: str,
    return_stats: bool,
) -> float:
    """All options of batch_hard_triplet_loss; returns the margin as a float."""
    mining_strategies(function, positive=positive, negative=negative)
    flag(function, "soft", soft)
    _loss_options(function, distance, reduction, TRIPLET_REDUCTIONS, return_stats)
    return margin_value(function, "margin", margin)


def batch_all_options(
    function: str, *, margin: float, distance: str, reduction: str, return_stats: bool
) -> float:
    """All options of batch_all_triplet_loss; returns the margin as a float."""
    _loss_options(function, distance, reduction, BATCH_REDUCTIONS, return_stats)
    return margin_value(function, "margin", margin)


def semi_hard_options(
    function: str,
    *,
    margin: float,
    soft: bool,
    definition: str,
    distance: str,
    reduction: str,
    return_stats: bool,
) -> float:
    """All options of batch_semi_hard_triplet_loss; returns the margin as a float."""
    flag(function, "soft", soft)
    choice(function, "definition", definition, SEMI_HARD_DEFINITIONS)
    if soft and definition == "pml":
        raise error(ValueError, function, "soft", 'False with definition="pml"', "True")
    _loss_options(function, distance, reduction, BATCH_REDUCTIONS, return_stats)
    return margin_value(function, "margin", margin)


def batch_contrastive_options(
    function: str,
    *,
    pos_margin: float,
    neg_margin: float,
    squared: bool,
    distance: str,
    reduction: str,
    return_stats: bool,
) -> tuple[float, float]:
    """All options of batch_contrastive_loss; returns pos_margin and neg_margin as floats."""
    flag(function, "squared", squared)
    _loss_options(function, distance, reduction, BATCH_REDUCTIONS, return_stats)
    pos_margin = margin_value(function, "pos_margin", pos_margin)
    return pos_margin, margin_value(function, "neg_margin", neg_margin)


def cross_batch_memory_options(
    function: str, *, embedding_size: int, memory_size: int, weight: float
) -> tuple[int, int, float]:
    """The options of CrossBatchMemory, as ints and a float."""
    return (
        positive_integer(function, "embedding_size", embedding_size),
        positive_integer(function, "memory_size", memory_size),
        margin_value(function, "weight", weight),
    )


def cross_batch_memory(function: str, embeddings: Tensor, labels: Tensor, memory: Tensor) -> None:
    """A batch that a loss takes and that `memory` [M, D] can hold as it is, without rounding."""
    check_embeddings(function, "embeddings", embeddings, "[N, D]")
    check_columns(function, "embeddings", embeddings, "N", "memory", memory)
    if torch.promote_types(embeddings.dtype, memory.dtype) != memory.dtype:
        expected = f"of a dtype that a {short_name(memory.dtype)} memory holds exactly"
        raise error(TypeError, function, "embeddings", expected, describe(embeddings))
    check_labels(function, "labels", labels, "N", "embeddings", embeddings)


def _loss_options(
    function: str, distance: str, reduction: str, reductions: tuple[str, ...], return_stats: bool
) -> None:
    choice(function, "distance", distance, DISTANCES)
    choice(function, "reduction", reduction, reductions)
    flag(function, "return_stats", return_stats)
