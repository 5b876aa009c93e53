"""The losses as modules: options at construction, tensors in `forward`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from . import _checks, functional
from .results import ContrastiveResult, TripletLossResult

__all__ = [
    "BatchAllTripletLoss",
    "BatchContrastiveLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
    "ContentLoss",
    "ContrastiveLoss",
    "GramMatrix",
    "StyleLoss",
    "TripletMarginLoss",
]


class _Options(nn.Module):
    """A module without parameters that holds the keyword options of one function."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _BatchLoss(_Options):
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


class BatchHardTripletLoss(_BatchLoss):
    """`functional.batch_hard_triplet_loss` as a module; same options, checked at construction."""

    function = staticmethod(functional.batch_hard_triplet_loss)

    def __init__(
        self,
        *,
        margin: float = 0.2,
        soft: bool = False,
        distance: str = "euclidean",
        reduction: str = "mean",
        return_stats: bool = False,
    ) -> None:
        super().__init__(
            margin=margin, soft=soft, distance=distance, reduction=reduction, return_stats=return_stats
        )
        _checks.batch_hard_options(type(self).__name__, **self.options)


class BatchSemiHardTripletLoss(_BatchLoss):
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


class BatchAllTripletLoss(_BatchLoss):
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


class BatchContrastiveLoss(_BatchLoss):
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


class ContrastiveLoss(_Options):
    """`functional.contrastive_loss` as a module; same options, checked at construction."""

    def __init__(self, *, margin: float = 1.0, reduction: str = "mean") -> None:
        super().__init__(margin=margin, reduction=reduction)
        _checks.contrastive_options(type(self).__name__, **self.options)

    def forward(self, x1: Tensor, x2: Tensor, y: Tensor) -> Tensor:
        """x1, x2 [N, D], y [N] with 1 for similar pairs; a scalar or, for "none", [N]."""
        return functional.contrastive_loss(x1, x2, y, **self.options)


class TripletMarginLoss(_Options):
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


class GramMatrix(_Options):
    """`functional.gram_matrix` as a module; same option, checked at construction."""

    def __init__(self, *, normalize: str | float = "chw") -> None:
        super().__init__(normalize=normalize)
        _checks.gram_normalization(type(self).__name__, normalize)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, C, *spatial] to [B, C, C]."""
        return functional.gram_matrix(features, **self.options)


class StyleLoss(_Options):
    """`functional.style_loss` as a module; same options, checked at construction."""

    def __init__(
        self,
        *,
        weights: Sequence[float] | None = None,
        normalize: str | float = "chw",
        reduction: str = "mean",
        distance: str = "l2",
    ) -> None:
        super().__init__(weights=weights, normalize=normalize, reduction=reduction, distance=distance)
        _checks.style_options(type(self).__name__, **self.options)

    def forward(self, features: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """features [B, C, *spatial] and Gram matrices [C, C], [1, C, C] or [B, C, C], per layer; a scalar."""
        return functional.style_loss(features, target, **self.options)


class ContentLoss(_Options):
    """`functional.content_loss` as a module; same options, checked at construction."""

    def __init__(self, *, weights: Sequence[float] | None = None, reduction: str = "mean") -> None:
        super().__init__(weights=weights, reduction=reduction)
        _checks.content_options(type(self).__name__, **self.options)

    def forward(self, features: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """features and target of one shape, per layer; a scalar."""
        return functional.content_loss(features, target, **self.options)
