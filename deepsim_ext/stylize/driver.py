"""The optimisation of a picture, step by step and from coarse to fine."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks.texts import describe, error
from ..nn import StyleTransferLoss
from ..vgg import VGG19Features
from .lbfgs import LBFGS
from .options import LEARNING_RATES, Options
from .pictures import (
    Picture,
    as_mask,
    as_picture,
    fitted,
    luminance,
    matched_luminance,
    resized,
    with_luminance,
)

STARTS = ("content", "noise")
NOISE = 0.1  # deviation of the noise to start from, around grey
# A step after which the loss is that many times larger, or not finite, is taken again, a quarter as long.
LARGEST_GROWTH, SHORTER = 3.0, 0.25


class Record(NamedTuple):
    """One step. Terms are weighted; the loss is their sum, of the picture that the step started from."""

    step: int  # from 1
    steps: int
    height: int
    width: int
    loss: float
    content: float
    style: float
    tv: float
    seconds: float


@torch.inference_mode(False)
@torch.enable_grad()
def stylize(
    content: Picture | None,
    styles: Picture | Sequence[Picture],
    *,
    start: str | Picture | None = None,
    content_masks: Sequence[Picture] | None = None,
    style_masks: Sequence[Picture] | None = None,
    callback: Callable[[Record, Tensor], object] | None = None,
    **options: Any,
) -> Tensor:
    """The content picture in the style of others, or without content a texture.

        result = stylize("content.jpg", "style.jpg", size=512, preserve_colors=True)

    Pictures are paths, PIL images, uint8 arrays [H, W, 3] or float tensors [3, H, W] in [0, 1]. The same
    pictures, options and seed give the same result on the same machine. Source: Gatys, Ecker, Bethge, "Image
    Style Transfer Using Convolutional Neural Networks" (2016); coarse to fine and color preservation: Gatys,
    Ecker, Bethge, Hertzmann, Shechtman, "Controlling Perceptual Factors in Neural Style Transfer" (2017).

    Args:
        content: what to see, or None.
        styles: one picture, or a list or tuple of them, blended.
        start: "content" (the default), "noise" (the default without content), or a picture.
        content_masks: None, or one mask per style: where its style goes. [H, W], or a picture whose
            luminance counts.
        style_masks: None, or with content_masks one mask per style: which part of it is the style.
        callback: called after every step with its `Record` and the picture, [3, H, W], so far.
        size: pixels of the result's longer side; without content and start, of both.
        scales: sizes to work at, each twice the one before; those too small for the network are left out.
        steps: evaluations of the network, in all; a scale gets half of those of the coarser one.
        optimizer: "lbfgs" or "adam".
        learning_rate: None for 1 (lbfgs) or 0.02 (adam).
        preset: of `style_preset`. Those for VGG16 run on the layers of VGG19 of the same names.
        content_weight, style_weight, tv_weight: None for the preset's, but 1e4 for gatys_paper's style. A
            preset without content loss keeps the content only by where it starts, unless content_weight is
            given.
        blend: None for equal shares, or one number >= 0 per style.
        style_scale: size of the style pictures, as a factor of `size`: of their brush strokes.
        preserve_colors: only the luminance takes the style, the chroma stays the content's.
        seed: of the noise and of random weights.
        pooling, weights: as in `vgg.VGG19Features`.
        device: where to compute.

    Returns:
        float32 [3, H, W], RGB in [0, 1], on the CPU.

    Raises:
        TypeError, ValueError: an argument that is none of those, a file that is no picture, pictures too
            small for the network, or a loss that is not finite.
        FileNotFoundError: no weights.
    """
    transfer = transfer_of(
        content, styles, Options(**options), start=start, content_masks=content_masks, style_masks=style_masks
    )
    while not transfer.done:
        record = transfer.advance()
        if callback is not None:
            callback(record, transfer.image)
    return transfer.image


def transfer_of(
    content: Picture | None,
    styles: Picture | Sequence[Picture],
    options: Options,
    *,
    start: str | Picture | None,
    content_masks: Sequence[Picture] | None,
    style_masks: Sequence[Picture] | None,
) -> Transfer:
    """The run that `stylize` does, at its beginning."""
    styles = styles if isinstance(styles, (list, tuple)) else [styles]
    if start is None:
        start = "noise" if content is None else "content"
    masks = {"content_masks": content_masks, "style_masks": style_masks}
    for name, given in masks.items():
        if given is not None and not isinstance(given, (list, tuple)):
            raise error(TypeError, "stylize", name, "None or a list of masks", describe(given))
    return Transfer(
        None if content is None else as_picture(content, "content"),
        [as_picture(style, f"styles[{i}]") for i, style in enumerate(styles)],
        options,
        start=start if isinstance(start, str) and start in STARTS else as_picture(start, "start"),
        **{
            name: given and [as_mask(mask, f"{name}[{i}]") for i, mask in enumerate(given)]
            for name, given in masks.items()
        },
    )


class Transfer:
    """A run of `stylize` that can be looked at, stopped and continued between steps.

    Its `state_dict` holds the optimiser too: another Transfer of the same pictures and options that loads it
    goes on with the same bits.

    Args:
        content: [3, H, W] or None.
        styles: [3, H, W] each.
        start: "content", "noise" or [3, H, W].
        content_masks, style_masks: None or one [H, W] per style.
    """

    def __init__(
        self,
        content: Tensor | None,
        styles: Sequence[Tensor],
        options: Options,
        *,
        start: str | Tensor,
        content_masks: Sequence[Tensor] | None = None,
        style_masks: Sequence[Tensor] | None = None,
    ) -> None:
        _check_together(content, styles, options, start, content_masks, style_masks)
        self.options = options
        self._content, self._styles, self._start = content, styles, start
        self._content_masks, self._style_masks = content_masks, style_masks
        rules = options.rules(with_content=content is not None)
        layers = [*rules.style_layers, *rules.content_layers]
        self._network = VGG19Features(
            layers, pooling=options.pooling, weights=options.weights, seed=options.seed, scale=rules.scale
        ).to(options.device)
        self._criterion = StyleTransferLoss.from_preset(rules)
        self._sizes = self._planned_sizes()
        self._plan = options.steps_by_scale(len(self._sizes))
        self.records: list[Record] = []
        self._begin(0, self._first_image())

    # ---- what there is -------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return sum(self._plan)

    @property
    def done(self) -> bool:
        return len(self.records) == self.steps

    @property
    def image(self) -> Tensor:
        """The picture so far, [3, H, W] on the CPU, of the size of the scale that it is at."""
        values = self._image.detach().cpu()
        if self.options.preserve_colors:
            values = with_luminance(resized(self._content, *values.shape[1:]), values)
        return values.clamp(0, 1)

    # ---- steps ---------------------------------------------------------------------------------------------

    def advance(self) -> Record:
        """One evaluation and one step.

        Raises:
            ValueError: the loss or its gradient is not finite where a scale starts, or after a step of Adam.
        """
        began = time.perf_counter()
        if len(self.records) == sum(self._plan[: self._scale + 1]):
            image = self._image.detach().cpu().clamp(0, 1)
            self._begin(self._scale + 1, resized(image, *self._sizes[self._scale + 1]))
        terms, gradient = self._evaluate()
        loss, size = terms[0], gradient.abs().sum(dtype=torch.float64).item()
        finite = math.isfinite(loss) and math.isfinite(size)
        # Steps of L-BFGS are bounded, so that a shorter one helps; those of Adam are as long as asked for.
        if not finite and (self._good is None or self.options.optimizer == "adam"):
            remedy = "smaller weights" if self._good is None else "a smaller learning_rate"
            raise ValueError(f"stylize: the loss is {loss}, its gradient {size}: use {remedy}")
        if finite and loss <= LARGEST_GROWTH * self._loss:
            if self._good is None:
                self._factor = 1 / size if size else 1.0
            self._loss, self._good = loss, self._image.detach().clone()
            self._image.grad = self._factor * gradient
            self._optimizer.step()
        else:
            self._image.data.lerp_(self._good, 1 - SHORTER)
        height, width = self._sizes[self._scale]
        seconds = time.perf_counter() - began
        record = Record(len(self.records) + 1, self.steps, height, width, *terms, seconds)
        self.records.append(record)
        return record

    def _evaluate(self) -> tuple[list[float], Tensor]:
        """Loss, content, style and total variation; and the gradient."""
        image = self._image.expand(3, -1, -1)[None]
        smoothed = self._network.normalized(image) if self._criterion.options["tv_weight"] else None
        result = self._criterion(self._network(image), smoothed, return_terms=True)
        (gradient,) = torch.autograd.grad(result.loss, self._image)
        return torch.stack(result).tolist(), gradient

    def _new_optimizer(self) -> torch.optim.Optimizer:
        rate = self.options.learning_rate
        rate = LEARNING_RATES[self.options.optimizer] if rate is None else float(rate)
        if self.options.optimizer == "adam":
            return torch.optim.Adam([self._image], lr=rate)
        return LBFGS(self._image, lr=rate)

    # ---- scales --------------------------------------------------------------------------------------------

    def _planned_sizes(self) -> list[tuple[int, int]]:
        """Height and width at every scale that has pixels enough, from the coarsest to the finest."""
        start = self._start if isinstance(self._start, Tensor) else None
        shaped = self._content if self._content is not None else start
        shape = (1, 1) if shaped is None else shaped.shape[1:]
        pictures = {"the picture": (shape, 1.0)}
        pictures |= {
            f"style {i}": (style.shape[1:], self.options.style_scale)
            for i, style in enumerate(self._styles, 1)
        }
        sizes = []
        for i in range(self.options.scales):
            size = self.options.size / 2 ** (self.options.scales - 1 - i)
            found = {name: fitted(round(size * factor), *shape) for name, (shape, factor) in pictures.items()}
            small = [name for name, sides in found.items() if min(sides) < self._network.least_side]
            if not small:
                sizes.append(found["the picture"])
        if small:
            height, width = found[small[0]]
            least = self._network.least_side
            raise ValueError(
                f"stylize: size must be larger: {small[0]} has {height} x {width} pixels at size"
                f" {self.options.size}, and the network needs {least} x {least}"
            )
        return sizes

    def _first_image(self) -> Tensor:
        """[3, H, W] to start from, or [1, H, W] if only luminance is optimised."""
        height, width = self._sizes[0]
        if isinstance(self._start, Tensor):
            image = resized(self._start, height, width)
        elif self._start == "content":
            image = resized(self._content, height, width)
        else:
            generator = torch.Generator().manual_seed(self.options.seed)
            image = 0.5 + NOISE * torch.randn(3, height, width, generator=generator)
        return luminance(image) if self.options.preserve_colors else image

    def _begin(self, scale: int, image: Tensor) -> None:
        self._scale = scale
        self._set_targets()
        self._image = image.to(self.options.device, copy=True).requires_grad_()
        self._optimizer = self._new_optimizer()
        # Of the gradient: the first one's absolute values add up to 1, whatever the loss is measured in.
        self._factor = 1.0
        self._loss = math.inf
        self._good: Tensor | None = None  # where the loss was as it should be, last

    @torch.no_grad()
    def _set_targets(self) -> None:
        height, width = self._sizes[self._scale]
        self._criterion.reset()
        if self._content is not None:
            content = resized(self._content, height, width)
            shown = luminance(content).expand(3, -1, -1) if self.options.preserve_colors else content
            self._criterion.set_content(self._features(shown))
        found = []
        for style in self._styles:
            size = round(max(height, width) * self.options.style_scale)
            style = resized(style, *fitted(size, *style.shape[1:]))
            if self.options.preserve_colors:
                style = matched_luminance(style, content).expand(3, -1, -1)
            found.append(self._features(style))
        if self._content_masks is None:
            self._criterion.set_style(found, blend_weights=self.options.blend_of(len(found)))
            return
        style_masks = self._style_masks or [None] * len(found)
        for mask, features, style_mask in zip(self._content_masks, found, style_masks, strict=True):
            self._criterion.add_region(
                mask.to(self.options.device),
                features,
                style_masks=None if style_mask is None else style_mask.to(self.options.device),
            )

    def _features(self, picture: Tensor) -> dict[str, Tensor]:
        return self._network(picture[None].to(self.options.device))

    # ---- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, as tensors, numbers, strings, lists and dicts."""
        return {
            "of": self._fingerprint(),
            "scale": self._scale,
            "records": [list(record) for record in self.records],
            "image": self._image.detach(),
            "optimizer": self._optimizer.state_dict(),
            "factor": self._factor,
            "loss": self._loss,
            "good": self._good,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes where another run was.

        Raises:
            ValueError: that run had other pictures or options.
        """
        if state["of"] != self._fingerprint():
            raise ValueError("the run that was stopped had other pictures or options")
        self._begin(state["scale"], state["image"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._factor, self._loss = state["factor"], state["loss"]
        self._good = None if state["good"] is None else state["good"].to(self.options.device)
        self.records = [Record(*record) for record in state["records"]]

    def _fingerprint(self) -> str:
        """Of everything that the result depends on."""
        found = hashlib.sha256()
        chosen = asdict(self.options) | {"device": "", "weights": str(self.options.weights)}
        masks = [*(self._content_masks or ()), None, *(self._style_masks or ())]
        for value in (repr(chosen), self._content, *self._styles, self._start, *masks):
            if isinstance(value, Tensor):
                found.update(f"{list(value.shape)}".encode() + value.contiguous().numpy().tobytes())
            else:
                found.update(f"{value}".encode())
        return found.hexdigest()


def _check_together(
    content: Tensor | None,
    styles: Sequence[Tensor],
    options: Options,
    start: str | Tensor,
    content_masks: Sequence[Tensor] | None,
    style_masks: Sequence[Tensor] | None,
) -> None:
    """What each argument alone cannot show."""
    if not styles:
        raise error(ValueError, "stylize", "styles", "at least one picture", "none")
    options.blend_of(len(styles))
    if content is None:
        if isinstance(start, str) and start == "content":
            raise error(ValueError, "stylize", "start", '"noise" or a picture without content', '"content"')
        if options.preserve_colors:
            raise error(ValueError, "stylize", "preserve_colors", "False without content", "True")
    rules = options.rules(with_content=content is not None)
    if not rules.style_weight and not rules.content_layers:
        raise error(ValueError, "stylize", "style_weight", "> 0 where there is no content loss", "0")
    if content_masks is not None and options.blend is not None:
        raise error(ValueError, "stylize", "blend", "None with content_masks", str(list(options.blend)))
    if style_masks is not None and content_masks is None:
        raise error(ValueError, "stylize", "style_masks", "None without content_masks", "masks")
    for name, masks in (("content_masks", content_masks), ("style_masks", style_masks)):
        if masks is not None and len(masks) != len(styles):
            expected = f"one mask per style ({len(styles)})"
            raise error(ValueError, "stylize", name, expected, str(len(masks)))
        for i, mask in enumerate(masks or ()):
            if not (mask > 0).any():
                raise error(ValueError, "stylize", f"{name}[{i}]", "a mask with values > 0", "only 0")
