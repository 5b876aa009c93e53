"""Style, content and smoothness of features and images: one function each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import _checks, functional
from ._options import Options


class GramMatrix(Options):
    """`functional.gram_matrix` as a module; same option, checked at construction."""

    def __init__(self, *, normalize: str | float = "chw") -> None:
        super().__init__(normalize=normalize)
        _checks.gram_normalization(type(self).__name__, normalize)

    def forward(self, features: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """features [B, C, *spatial] to [B, C, C]; mask [*spatial], [1, *spatial] or [B, *spatial]."""
        return functional.gram_matrix(features, mask=mask, **self.options)


class StyleLoss(Options):
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

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """features [B, C, *spatial] and Gram matrices [C, C], [1, C, C] or [B, C, C], per layer; a scalar.

        mask [*spatial], [1, *spatial] or [B, *spatial], per layer.
        """
        return functional.style_loss(features, target, mask=mask, **self.options)


class ContentLoss(Options):
    """`functional.content_loss` as a module; same options, checked at construction."""

    def __init__(self, *, weights: Sequence[float] | None = None, reduction: str = "mean") -> None:
        super().__init__(weights=weights, reduction=reduction)
        _checks.content_options(type(self).__name__, **self.options)

    def forward(self, features: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """features and target of one shape, per layer; a scalar."""
        return functional.content_loss(features, target, **self.options)


class TotalVariationLoss(Options):
    """`functional.total_variation_loss` as a module; same options, checked at construction."""

    def __init__(self, *, distance: str = "l2", reduction: str = "mean") -> None:
        super().__init__(distance=distance, reduction=reduction)
        _checks.total_variation_options(type(self).__name__, **self.options)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, C, *spatial]; a scalar."""
        return functional.total_variation_loss(image, **self.options)
