"""Losses of embeddings: of labelled batches, given triplets and given pairs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import _checks, functional
from ..results import ContrastiveResult, TripletLossResult
from ._options import Options


class BatchLoss(Options):
    """A loss of a labelled batch, or of a batch and a reference set."""

    function: Callable[..., Tensor | TripletLossResult | ContrastiveResult]

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor | TripletLossResult | ContrastiveResult:
        """embeddings [N, D], labels int64 [N], references [M, D] and [M]; a scalar, or [N] for "none"."""
        return self.function(embeddings, labels, ref_embeddings, ref_labels, **self.options)


class BatchHardTripletLoss(BatchLoss):
    """`functional.batch_hard_triplet_loss` as a module; same options, checked at construction."""

    function = staticmethod(functional.batch_hard_triplet_loss)

    def __init__(
        self,
        *,
        positive: str = "hard",
        negative: str = "hard",
        margin: float = 0.2,
        soft: bool = False,
        distance: str = "euclidean",
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            positive=positive,
            negative=negative,
            margin=margin,
            soft=soft,
            distance=distance,
            reduction=reduction,
            return_stats=return_stats,
        )
        _checks.batch_hard_options(type(self).__name__, **self.options)


class BatchSemiHardTripletLoss(BatchLoss):
    """`functional.batch_semi_hard_triplet_loss` as a module; same options, checked at construction."""

    function = staticmethod(functional.batch_semi_hard_triplet_loss)

    def __init__(
        self,
        *,
        margin: float = 0.2,
        soft: bool = False,
        definition: str = "facenet",
        distance: str = "euclidean",
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            margin=margin,
            soft=soft,
            definition=definition,
            distance=distance,
            reduction=reduction,
            return_stats=return_stats,
        )
        _checks.semi_hard_options(type(self).__name__, **self.options)


class BatchAllTripletLoss(BatchLoss):
    """`functional.batch_all_triplet_loss` as a module; same options, checked at construction."""

    function = staticmethod(functional.batch_all_triplet_loss)

    def __init__(
        self,
        *,
        margin: float = 0.2,
        distance: str = "euclidean",
        reduction: str = "mean_nonzero",
        return_stats: bool = False,
    ) -> None:
        super().__init__(margin=margin, distance=distance, reduction=reduction, return_stats=return_stats)
        _checks.batch_all_options(type(self).__name__, **self.options)


class BatchContrastiveLoss(BatchLoss):
    """`functional.batch_contrastive_loss` as a module; same options, checked at construction."""

    function = staticmethod(functional.batch_contrastive_loss)

    def __init__(
        self,
        *,
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        squared: bool = False,
        distance: str = "euclidean",
        reduction: str = "mean_nonzero",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            pos_margin=pos_margin,
            neg_margin=neg_margin,
            squared=squared,
            distance=distance,
            reduction=reduction,
            return_stats=return_stats,
        )
        _checks.batch_contrastive_options(type(self).__name__, **self.options)


class ContrastiveLoss(Options):
    """`functional.contrastive_loss` as a module; same options, checked at construction."""

    def __init__(self, *, margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(margin=margin, reduction=reduction)
        _checks.contrastive_options(type(self).__name__, **self.options)

    def forward(self, x1: Tensor, x2: Tensor, y: Tensor) -> Tensor:
        """x1, x2 [N, D], y [N] with 1 for similar pairs; a scalar or, for "none", [N]."""
        return functional.contrastive_loss(x1, x2, y, **self.options)


class TripletMarginLoss(Options):
    """`functional.triplet_margin_loss` as a module; same options, checked at construction."""

    def __init__(
        self,
        *,
        margin: float = 0.2,
        swap: bool = False,
        soft: bool = False,
        distance: str = "sqeuclidean",
        reduction: str = "mean",
    ) -> None:
        super().__init__(margin=margin, swap=swap, soft=soft, distance=distance, reduction=reduction)
        _checks.triplet_margin_options(type(self).__name__, **self.options)

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """anchor, positive, negative [T, D]; a scalar or, for "none", [T]."""
        return functional.triplet_margin_loss(anchor, positive, negative, **self.options)
