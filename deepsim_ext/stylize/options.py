"""What a run can be asked for, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import _checks
from .._checks.options import is_number, positive_integer
from .._checks.texts import describe, error
from ..presets import StylePreset, style_preset
from ..vgg import POOLINGS

OPTIMIZERS = ("lbfgs", "adam")
LEARNING_RATES = {"lbfgs": 1.0, "adam": 0.02}
CONTENT_LAYERS = ("relu4_2",)  # where a preset has none
# Of gatys_paper, a ratio of 1e-4 from the middle of the range that the paper shows: its content loss is a sum
# over positions, and with the preset's 1e3 it holds the style down from some 300 pixels on.
STYLE_WEIGHT = 1e4


@dataclass(frozen=True)
class Options:
    """Options of `stylize`, which documents them; checked at construction.

    Raises:
        TypeError, ValueError: an option that is none of those.
    """

    size: int = 384
    scales: int = 2
    steps: int = 150
    optimizer: str = "lbfgs"
    learning_rate: float | None = None
    preset: str = "gatys_paper"
    content_weight: float | None = None
    style_weight: float | None = None
    tv_weight: float | None = None
    blend: Sequence[float] | None = None
    style_scale: float = 1.0
    preserve_colors: bool = False
    seed: int = 0
    pooling: str = "average"
    weights: str | Path | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("size", "scales", "steps"):
            positive_integer("stylize", name, getattr(self, name))
        if self.steps < self.scales:
            expected = f"at least the number of scales, {self.scales}"
            raise error(ValueError, "stylize", "steps", expected, describe(self.steps))
        _checks.choice("stylize", "optimizer", self.optimizer, OPTIMIZERS)
        _checks.choice("stylize", "pooling", self.pooling, POOLINGS)
        _checks.flag("stylize", "preserve_colors", self.preserve_colors)
        for name in ("content_weight", "style_weight", "tv_weight", "learning_rate"):
            if getattr(self, name) is not None:
                _checks.margin_value("stylize", name, getattr(self, name))
        if not is_number(self.style_scale) or not 0 < self.style_scale < math.inf:
            expected = "a finite number > 0"
            raise error(ValueError, "stylize", "style_scale", expected, describe(self.style_scale))
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise error(ValueError, "stylize", "seed", "an integer from 0 to 2^63 - 1", describe(self.seed))
        style_preset(self.preset)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, TypeError) as problem:
            raise ValueError(f"stylize: device {self.device}: {str(problem).splitlines()[0]}") from None

    def rules(self, *, with_content: bool) -> StylePreset:
        """The preset with the weights asked for and the layer names that `VGG19Features` has.

        Caffe's ReLU works in place, so conv4_2 of a paper that used it is relu4_2. A preset without content
        loss gets one, the mean over relu4_2, if it is asked for a weight.
        """
        preset = style_preset(self.preset)
        content_layers = preset.content_layers or CONTENT_LAYERS
        content_weight = preset.content_weight if self.content_weight is None else self.content_weight
        if not with_content or not content_weight:
            content_layers, content_weight = (), 0.0
        layers = {"style_layers": preset.style_layers, "content_layers": content_layers}
        if preset.scale == "caffe":
            layers = {kind: tuple(n.replace("conv", "relu") for n in names) for kind, names in layers.items()}
        return replace(
            preset,
            **layers,
            content_weight=float(content_weight),
            style_weight=self._style_weight(preset),
            tv_weight=preset.tv_weight if self.tv_weight is None else float(self.tv_weight),
        )

    def _style_weight(self, preset: StylePreset) -> float:
        if self.style_weight is not None:
            return float(self.style_weight)
        return STYLE_WEIGHT if self.preset == "gatys_paper" else preset.style_weight

    def steps_by_scale(self, scales: int) -> list[int]:
        """Steps from the coarsest scale to the finest: each has half of those before it, and 1 at least."""
        shares = [2 ** (scales - 1 - i) for i in range(scales)]
        found = [max(1, self.steps * share // sum(shares)) for share in shares]
        found[0] += self.steps - sum(found)
        return found

    def blend_of(self, styles: int) -> list[float]:
        """One weight per style; they add up to 1."""
        expected = f"None or {styles} finite numbers >= 0, one per style, not all 0"
        blend = [1.0] * styles if self.blend is None else self.blend
        if not isinstance(blend, (list, tuple)) or not all(is_number(value) for value in blend):
            raise error(TypeError, "stylize", "blend", expected, describe(blend))
        total = math.fsum(blend)
        if len(blend) != styles or not all(0 <= value < math.inf for value in blend) or total == 0:
            raise error(ValueError, "stylize", "blend", expected, str(list(blend)))
        return [value / total for value in blend]
