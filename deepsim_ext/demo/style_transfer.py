"""Neural style transfer of Gatys, Ecker and Bethge (2016) on VGG19, with both versions of the style loss.

Content: scikit-image's `astronaut`. Style: its stained tissue section, `immunohistochemistry`.

Rounding makes two transfers part that start alike, whatever computes them: L-BFGS divides by differences of
gradients, each step feeds the next, and float32 leaves 1e-7 to grow. The reference with one thread against
the reference with two shows it as well: 1e-7 in the first steps, 1 % within thirty, then no more, for both
come down to the same loss. So the two versions are compared in three ways: on the same features, at every
step of the first transfer, where nothing can build up; over the first steps of two transfers; and over the
whole of them, with a tolerance for what has built up.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from skimage import data
from torch import Tensor
from tqdm import tqdm

from .. import functional, reference
from ..stylize.pictures import to_array, to_tensor
from ..vgg import VGG19Features
from . import torch_versions
from .memory import peak_extra_bytes
from .report import (
    Check,
    MeasuredLoss,
    Part,
    Row,
    median_milliseconds,
    relative_differences,
    timed_loss,
)

# Where the paper writes conv1_1, ... it means the rectified response: in Caffe the ReLU works in place.
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
CONTENT_LAYER = "relu4_2"
STYLE_WEIGHTS = [300.0] * len(STYLE_LAYERS)
CONTENT_WEIGHT = 1.0

SAME_FEATURES_TOLERANCE, SAME_FEATURES_GRADIENT_TOLERANCE = 1e-5, 1e-4
EARLY_STEPS, EARLY_TOLERANCE = 5, 1e-5
CURVES_TOLERANCE = 0.1  # 2 % measured


def transfer(
    style_loss: MeasuredLoss,
    network: VGG19Features,
    content: Tensor,
    style: Tensor,
    steps: int,
    name: str,
) -> tuple[Tensor, list[float]]:
    """Starts from the content picture; returns the image and the total loss at each of the evaluations."""
    with torch.no_grad():
        targets = [reference.gram_matrix(f) for f in style_features(network, style)]
        content_target = network(content)[CONTENT_LAYER]
    # torch's L-BFGS opens with a step whose absolute values sum up to 1 and takes its first idea of the
    # curvature from there. In grey levels that step would drown in rounding; in these units it changes
    # a pixel by one level on average.
    unit = content.numel() / 255
    parameter = (content / unit).requires_grad_()
    losses: list[float] = []
    # With tolerances of 0 it takes exactly `steps` evaluations.
    optimizer = torch.optim.LBFGS(
        [parameter], max_iter=steps, tolerance_grad=0, tolerance_change=0, history_size=20
    )
    with tqdm(total=steps, desc=f"style transfer, {name}", unit="step") as progress:

        def closure() -> float:
            parameter.grad = None
            found = network(unit * parameter)
            features, content_features = [found[layer] for layer in STYLE_LAYERS], found[CONTENT_LAYER]
            style_value, gradients = style_loss(
                features, lambda loss, fs: loss(fs, targets, weights=STYLE_WEIGHTS)
            )
            content_value, content_gradients, _ = timed_loss(
                lambda fs: CONTENT_WEIGHT * functional.content_loss(fs[0], content_target),
                [content_features],
            )
            torch.autograd.backward([*features, content_features], [*gradients, *content_gradients])
            losses.append(style_value + content_value)
            progress.update()
            progress.set_postfix(loss=f"{losses[-1]:.4g}")
            return losses[-1]

        optimizer.step(closure)
    return unit * parameter.detach(), losses


def run(output: Path, *, quick: bool = False) -> Part:
    """Stylises the picture with both versions, writes the figures, and compares."""
    side, steps = (96, 8) if quick else (224, 80)
    network = VGG19Features([*STYLE_LAYERS, CONTENT_LAYER], pooling="average")  # as the paper advises
    pictures = [resized(picture, side) for picture in (data.astronaut(), data.immunohistochemistry())]
    content, style = (to_tensor(picture)[None] for picture in pictures)

    loss = MeasuredLoss(functional.style_loss, reference.style_loss)
    image, losses = transfer(loss, network, content, style, steps, "deepsim_ext")
    reference_loss = MeasuredLoss(reference.style_loss)
    reference_image, reference_losses = transfer(reference_loss, network, content, style, steps, "reference")

    along = relative_differences(loss.values, loss.expected_values)
    apart = relative_differences(losses, reference_losses)
    result = to_array(image[0])
    Image.fromarray(result).save(output / "style_result.png")
    return Part(
        "Style transfer",
        rows=[_transfer_row(loss, side, apart.max()), _eager_row(network, style, content, side)],
        checks=[
            Check(
                "style loss on the same features, relative difference", along.max(), SAME_FEATURES_TOLERANCE
            ),
            Check(
                "its gradient on the same features, relative difference",
                np.max(loss.gradient_differences),
                SAME_FEATURES_GRADIENT_TOLERANCE,
            ),
            Check(
                f"first {EARLY_STEPS} losses of the two transfers, relative difference",
                apart[:EARLY_STEPS].max(),
                EARLY_TOLERANCE,
            ),
            Check("loss curves of the two transfers, relative difference", apart.max(), CURVES_TOLERANCE),
        ],
        figures=[
            "style_result.png",
            _plot_result(
                [*pictures, result, to_array(reference_image[0])], losses, reference_losses, along, output
            ),
        ],
        numbers={
            "losses": losses,
            "reference_losses": reference_losses,
            "style_losses": loss.values,
            "reference_style_losses_on_the_same_features": loss.expected_values,
        },
    )


def style_features(network: VGG19Features, picture: Tensor) -> list[Tensor]:
    """One [B, C, H, W] per style layer."""
    found = network(picture)
    return [found[layer] for layer in STYLE_LAYERS]


def resized(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture as a square, uint8 [side, side, 3]."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS))


def _transfer_row(loss: MeasuredLoss, side: int, apart: float) -> Row:
    return Row(
        "reference.style_loss",
        f"5 layers at {side} x {side}, in the transfer",
        median(loss.milliseconds),
        median(loss.expected_milliseconds),
        peak_extra_bytes("style", "deepsim_ext", side),
        peak_extra_bytes("style", "reference", side),
        f"curves to {apart:.0e}",
    )


def _eager_row(network: VGG19Features, style: Tensor, content: Tensor, side: int) -> Row:
    """One call on the features of the content picture, against the usual eager version."""
    with torch.no_grad():
        targets = [reference.gram_matrix(f) for f in style_features(network, style)]
        features = style_features(network, content)

    def ours(fs: list[Tensor]) -> Tensor:
        return functional.style_loss(fs, targets, weights=STYLE_WEIGHTS)

    def eager(fs: list[Tensor]) -> Tensor:
        return torch_versions.style_loss(fs, targets, STYLE_WEIGHTS)

    milliseconds, torch_milliseconds = median_milliseconds([ours, eager], features, repeats=7)
    value, expected = ours(features).item(), eager(features).item()
    return Row(
        "eager style loss (bmm, mse_loss)",
        f"5 layers at {side} x {side}",
        milliseconds,
        torch_milliseconds,
        peak_extra_bytes("style", "deepsim_ext", side),
        peak_extra_bytes("style", "eager", side),
        f"loss to {abs(value - expected) / expected:.0e}",
    )


def _plot_result(
    pictures: list[np.ndarray],
    losses: list[float],
    reference_losses: list[float],
    along: np.ndarray,
    output: Path,
) -> str:
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=(1, 0.9))
    titles = ("content", "style", "result, deepsim_ext", "result, reference")
    for axes, title, picture in zip(top.subplots(1, 4), titles, pictures, strict=True):
        axes.imshow(picture)
        axes.set_title(title)
        axes.axis("off")
    curves, differences = bottom.subplots(1, 2)
    curves.semilogy(losses, color="tab:blue", linewidth=3, label="deepsim_ext")
    curves.semilogy(reference_losses, color="tab:orange", linewidth=1, label="reference")
    curves.set(xlabel="evaluation", ylabel="loss", title="The two transfers")
    curves.legend()
    # what is equal to the last bit is drawn at the bottom
    apart = relative_differences(losses, reference_losses)
    differences.semilogy(np.maximum(apart, 1e-8), color="tab:red", label="total loss of the two transfers")
    differences.semilogy(np.maximum(along, 1e-8), color="tab:green", label="style loss on the same features")
    differences.set(xlabel="evaluation", title="Relative difference", ylim=(5e-9, 50))
    differences.legend(loc="upper left")
    figure.savefig(output / "style_transfer.png", dpi=120)
    return "style_transfer.png"
