"""The loss of neural style transfer, with its targets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks, functional
from .._checks import style_transfer as checks
from .._checks.texts import error
from ..presets import StylePreset, style_preset
from ..results import StyleTransferResult

_TARGET = re.compile(r"(gram_\d+|mask|content)_\d+")  # what buffers of targets are called


class StyleTransferLoss(nn.Module):
    """Content, style and smoothness of an image: what neural style transfer minimises.

        criterion = StyleTransferLoss.from_preset("gatys_paper")
        criterion.set_style(network(style_picture))
        criterion.set_content(network(content_picture))
        loss = criterion(network(image))

    where `network` returns features by layer name, {"conv1_1": [B, C, *spatial], ...}, with 1 to 3 spatial
    dimensions. Targets are computed once, without gradient, and are buffers: `.to()` moves them, the
    state_dict has them, and a module of the same layers that has none yet loads them, on their device.

    A target of one sample holds for every image of a batch, one of B samples for its own. Gram matrices are
    kept per position and get the factor of `normalize` where they meet the image: pictures of any size are a
    style, as if they were as large as the image, and `normalize="bchw"` divides both by the B of the image.

    Source: Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks" (2016), eq. 7;
    regions and masks: Gatys, Ecker, Bethge, Hertzmann, Shechtman, "Controlling Perceptual Factors in Neural
    Style Transfer" (2017).

    Args:
        style_layers, content_layers: names of layers; content_layers is empty for textures.
        style_weight, content_weight, tv_weight: finite, >= 0; a term of weight 0 is left out and needs no
            target.
        style_layer_weights, content_layer_weights: None (1 each) or one finite number per layer.
        normalize, reduction, distance: as in `functional.style_loss`.
        content_reduction: as `reduction` in `functional.content_loss`.
        tv_distance, tv_reduction: as in `functional.total_variation_loss`.

    Raises:
        TypeError, ValueError: at construction, when a target is set and in `forward`, each before any work,
            for arguments that are none of the above, layers that the features lack, features that don't go
            with the targets, and targets that are not set. What raises leaves the targets as they were.
    """

    def __init__(
        self,
        style_layers: Sequence[str],
        content_layers: Sequence[str] = (),
        *,
        style_weight: float = 1.0,
        content_weight: float = 1.0,
        tv_weight: float = 0.0,
        style_layer_weights: Sequence[float] | None = None,
        content_layer_weights: Sequence[float] | None = None,
        normalize: str | float = "chw",
        reduction: str = "mean",
        distance: str = "l2",
        content_reduction: str = "mean",
        tv_distance: str = "l2",
        tv_reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "style_layers": style_layers,
            "content_layers": content_layers,
            "style_weight": style_weight,
            "content_weight": content_weight,
            "tv_weight": tv_weight,
            "style_layer_weights": style_layer_weights,
            "content_layer_weights": content_layer_weights,
            "normalize": normalize,
            "reduction": reduction,
            "distance": distance,
            "content_reduction": content_reduction,
            "tv_distance": tv_distance,
            "tv_reduction": tv_reduction,
        }
        checks.style_transfer_options(type(self).__name__, **self.options)
        self.style_layers = tuple(style_layers) if style_weight else ()
        self.content_layers = tuple(content_layers) if content_weight else ()
        self._style_weights = [style_weight * w for w in style_layer_weights or [1.0] * len(style_layers)]
        self._content_weights = [
            content_weight * w for w in content_layer_weights or [1.0] * len(content_layers)
        ]
        # Of every style that is set; its Gram matrices are gram_<style>_<layer>, its region mask_<style>.
        self._region_weights: list[float] = []

    @classmethod
    def from_preset(cls, preset: str | StylePreset, **overrides: Any) -> StyleTransferLoss:
        """The loss of a paper or library (see `style_preset`); overrides are arguments of the constructor.

        Other style layers take the preset's weight of a layer each.
        """
        if not isinstance(preset, StylePreset):
            preset = style_preset(preset)
        options = {
            "style_layers": preset.style_layers,
            "content_layers": preset.content_layers,
            "style_weight": preset.style_weight,
            "content_weight": preset.content_weight,
            "normalize": preset.normalize,
            "reduction": preset.reduction,
            "distance": preset.distance,
            "content_reduction": preset.content_reduction,
            "tv_weight": preset.tv_weight,
            "tv_distance": preset.tv_distance,
            "tv_reduction": preset.tv_reduction,
            **overrides,
        }
        options.setdefault("style_layer_weights", [preset.layer_weight] * len(options["style_layers"]))
        return cls(**options)

    def set_style(
        self,
        features: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        *,
        blend_weights: Sequence[float] | None = None,
        style_masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> None:
        """The style of the whole image, in place of all styles that were set.

        Args:
            features: of a style picture, or a list of several pictures' features: their Gram matrices'
                weighted mean is the target. Pictures may differ in size.
            blend_weights: None (equal) or one number >= 0 per picture; they are made to sum to 1.
            style_masks: None, or which part of the picture is the style, [*spatial] or [1 or B, *spatial] at
                any resolution; for a list of pictures a list of one mask or None each.
        """
        grams = self._blend("set_style", features, blend_weights, style_masks)
        self._forget("gram", "mask")
        self._region_weights = []
        self._add_style(grams, None, 1.0)

    def add_region(
        self,
        mask: Tensor,
        features: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]],
        *,
        weight: float = 1.0,
        blend_weights: Sequence[float] | None = None,
        style_masks: Tensor | Sequence[Tensor | None] | None = None,
    ) -> None:
        """The style of a region of the image, beside those that are set; their losses add up.

        Args:
            mask: the region, [*spatial] or [1 or B, *spatial], bool or floating with values >= 0, as a rule
                at the image's resolution. Averages over areas make a mask of a layer's size of it.
            weight: finite, >= 0; factor of the region's style loss.
            features, blend_weights, style_masks: as in `set_style`.
        """
        function = f"{type(self).__name__}.add_region"
        weight = _checks.margin_value(function, "weight", weight)
        grams = self._blend("add_region", features, blend_weights, style_masks)
        if grams:
            picture = features if isinstance(features, Mapping) else features[0]
            first = picture[self.style_layers[0]]
            mask = checks.picture_mask(function, "mask", mask, "the style", first, None)
            self._add_style(grams, _no_grad_copy(mask.to(grams[0].dtype)), weight)

    def set_content(self, features: Mapping[str, Tensor]) -> None:
        """The content to keep: features of the size of the image's."""
        checks.layer_tensors(f"{type(self).__name__}.set_content", "features", features, self.content_layers)
        for i, layer in enumerate(self.content_layers):
            self.register_buffer(f"content_{i}", _no_grad_copy(features[layer]))

    def reset(self) -> None:
        """Forgets all targets."""
        self._forget("gram", "mask", "content")
        self._region_weights = []

    def forward(
        self, features: Mapping[str, Tensor], image: Tensor | None = None, *, return_terms: bool = False
    ) -> Tensor | StyleTransferResult:
        """The loss of an image.

        Args:
            features: of the image, by layer name: [B, C, *spatial] in float32, float64, bfloat16 or float16.
                Targets go to the dtype of the arithmetic, float32 or, for float64, float64.
            image: [B, C, *spatial]; for the total variation alone, so not needed where tv_weight is 0.
            return_terms: whether to return the terms too.

        Returns:
            Scalar, differentiable in features and image to any order; with return_terms a
            `StyleTransferResult`.
        """
        self._check(features, image, return_terms)
        layers = self.style_layers + self.content_layers
        like = features[layers[0]] if layers else image
        zero = like.new_zeros((), dtype=_checks.compute_dtype(like))
        content = self._content_loss(features) if self.content_layers else zero
        style = self._style_loss(features) if self.style_layers else zero
        variation = zero
        if self.options["tv_weight"]:
            variation = self.options["tv_weight"] * functional.total_variation_loss(
                image, distance=self.options["tv_distance"], reduction=self.options["tv_reduction"]
            )
        loss = content + style + variation
        return StyleTransferResult(loss, content, style, variation) if return_terms else loss

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    # ---- targets -------------------------------------------------------------------------------------------

    def _blend(self, method: str, features: Any, blend_weights: Any, style_masks: Any) -> list[Tensor]:
        """The Gram matrices of a style, [B or 1, C, C] per layer, per position."""
        if not self.style_layers:
            return []
        pictures = checks.style_pictures(
            f"{type(self).__name__}.{method}",
            features,
            self.style_layers,
            blend_weights=blend_weights,
            style_masks=style_masks,
        )
        grams = []
        with torch.inference_mode(False), torch.no_grad():  # of which no tensor could be saved for backward
            for layer in self.style_layers:
                parts = []
                for picture in pictures:
                    f = picture.features[layer]
                    mask = None if picture.mask is None else _resize(picture.mask, f)
                    gram = functional.gram_matrix(f, normalize="hw", mask=mask)
                    parts.append(picture.blend_weight * gram)
                grams.append(sum(parts[1:], parts[0]))
        return grams

    def _add_style(self, grams: list[Tensor], mask: Tensor | None, weight: float) -> None:
        style = len(self._region_weights)
        for i, gram in enumerate(grams):
            self.register_buffer(f"gram_{style}_{i}", gram)
        if mask is not None:
            self.register_buffer(f"mask_{style}", mask)
        self._region_weights.append(weight)

    def _forget(self, *kinds: str) -> None:
        for name in list(self._buffers):
            if name.startswith(kinds):
                delattr(self, name)

    # ---- terms ---------------------------------------------------------------------------------------------

    def _check(self, features: Mapping[str, Tensor], image: Tensor | None, return_terms: bool) -> None:
        function = type(self).__name__
        _checks.flag(function, "return_terms", return_terms)
        checks.layer_tensors(function, "features", features, self.style_layers + self.content_layers)
        if self.style_layers and not self._region_weights:
            raise error(ValueError, function, "the style", "set by set_style or add_region", "none")
        if self.content_layers and "content_0" not in self._buffers:
            raise error(ValueError, function, "the content", "set by set_content", "none")
        for style in range(len(self._region_weights)):
            mask = self._buffers.get(f"mask_{style}")
            for i, layer in enumerate(self.style_layers):
                gram = getattr(self, f"gram_{style}_{i}")
                checks.meets_style(function, layer, features[layer], gram, mask, style)
        for i, layer in enumerate(self.content_layers):
            checks.meets_content(function, layer, features[layer], getattr(self, f"content_{i}"))
        if self.options["tv_weight"]:
            _checks.check_features(function, "image", image)

    def _content_loss(self, features: Mapping[str, Tensor]) -> Tensor:
        images, targets = [], []
        for i, layer in enumerate(self.content_layers):
            f = features[layer].to(_checks.compute_dtype(features[layer]))
            images.append(f)
            targets.append(getattr(self, f"content_{i}").to(f.dtype).expand_as(f))
        return functional.content_loss(
            images, targets, weights=self._content_weights, reduction=self.options["content_reduction"]
        )

    def _style_loss(self, features: Mapping[str, Tensor]) -> Tensor:
        """All layers of all regions in one call."""
        images, targets, weights, masks = [], [], [], []
        for style, region_weight in enumerate(self._region_weights):
            region = self._buffers.get(f"mask_{style}")
            for i, layer in enumerate(self.style_layers):
                f = features[layer]
                gram = getattr(self, f"gram_{style}_{i}").to(_checks.compute_dtype(f))
                images.append(f)
                targets.append(self._normalized(gram, f))
                weights.append(region_weight * self._style_weights[i])
                masks.append(None if region is None else _resize(region, f))
        return functional.style_loss(
            images,
            targets,
            weights=weights,
            normalize=self.options["normalize"],
            reduction=self.options["reduction"],
            distance=self.options["distance"],
            mask=masks,
        )

    def _normalized(self, gram: Tensor, features: Tensor) -> Tensor:
        """A Gram matrix per position, as `normalize` has it for features of that size."""
        normalize = self.options["normalize"]
        b, c = features.shape[:2]
        if normalize == "hw":
            return gram
        if normalize == "chw":
            return gram / c
        if normalize == "bchw":
            return gram / (b * c)
        gram = gram * features.shape[2:].numel()
        return gram if normalize == "none" else gram / normalize

    # ---- state ---------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StyleTransferLoss:
        def move(x: Tensor) -> Tensor:
            # Gram matrices leave the range of float16: .half() moves them and keeps their dtype.
            moved = fn(x)
            return x.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(move, recurse)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "style_layers": list(self.style_layers),
            "content_layers": list(self.content_layers),
            "region_weights": list(self._region_weights),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._region_weights = list(state["region_weights"])

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            own = self.get_extra_state()
            for kind in ("style_layers", "content_layers"):
                if state[kind] != own[kind]:
                    error_msgs.append(f"{kind} must be {own[kind]}, got {state[kind]}")
                    return
            # It may have other targets or none: buffers take the shapes of those that come, if all do.
            names = [k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)]
            targets = [name for name in names if _TARGET.fullmatch(name)]
            styles, layers = range(len(state["region_weights"])), range(len(self.style_layers))
            expected = {f"gram_{style}_{i}" for style in styles for i in layers}
            if any(name.startswith("content") for name in targets):
                expected |= {f"content_{i}" for i in range(len(self.content_layers))}
            missing = sorted(expected.difference(targets))
            if missing:
                missing_keys += [f"{prefix}{name}" for name in missing]
                return
            here = next(self.buffers(), None)
            device = None if here is None else here.device
            self.reset()
            for name in targets:
                self.register_buffer(name, torch.empty_like(state_dict[f"{prefix}{name}"], device=device))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _no_grad_copy(x: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return x.detach().clone()


def _resize(mask: Tensor, features: Tensor) -> Tensor:
    """A mask [B or 1, *spatial], averaged over areas, at the size of features."""
    mask = mask.to(_checks.compute_dtype(features))
    size = features.shape[2:]
    pool = {
        1: torch.nn.functional.adaptive_avg_pool1d,
        2: torch.nn.functional.adaptive_avg_pool2d,
        3: torch.nn.functional.adaptive_avg_pool3d,
    }[len(size)]
    return pool(mask[:, None], size)[:, 0]
