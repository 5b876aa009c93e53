"""Metric learning on scikit-learn's digits: trained on the digits 0-6, verified on 7-9, which it never saw.

A small CNN learns by batch-hard mining that images of one class lie close together, once with the compiled
loss and once with the reference, from the same seed. Two questions are asked of the outcome:

- Does it verify? Given two sides of a few images each, do they show the same digit? (See `verify`.)
- Do the two versions train alike? Each training step multiplies the rounding of the steps before it, a
  millionfold over the whole run: from the 1e-7 of float32 two curves would part although both are right. So
  the network runs in float64, and is smooth (GELU, average pooling): at the kinks of ReLU and max pooling the
  smallest difference can change the gradient at once. Then whole curves can be compared on any machine, with
  any number of threads. Besides, the reference is evaluated on the embeddings of the first run at every step,
  where nothing can build up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor, nn
from tqdm import tqdm

from .. import functional, reference
from .._threads import one_thread
from . import torch_versions
from .digits import EMBEDDING_SIZE, Sampler, build_network, embed, load_images
from .memory import peak_extra_bytes
from .report import (
    Check,
    MeasuredLoss,
    Part,
    Row,
    median_milliseconds,
    relative_differences,
)

TRAINED_DIGITS = 7  # 0-6; the others are for verification
CLASSES_PER_BATCH, IMAGES_PER_CLASS = 32, 2
MARGIN = 0.3
IMAGES_PER_SIDE = 3
REQUIRED_ACCURACY, REQUIRED_GAIN = 0.9, 0.03
LARGE_BATCH = 4096

# float64 rounds at 1e-16. On the same embeddings that is what remains. Over 500 steps of two runs it grows to
# some 1e-10, while a gradient that leaves out one row is beyond the tolerance within forty steps.
SAME_EMBEDDINGS_TOLERANCE = 1e-12
CURVES_TOLERANCE = 1e-6


def run(output: Path, *, quick: bool = False) -> Part:
    """Trains with both versions, writes the figures, and compares."""
    images, digits = load_images()
    unseen = digits >= TRAINED_DIGITS
    steps = 40 if quick else 500

    ours = Training(MeasuredLoss(functional.batch_hard_triplet_loss, reference.batch_hard_triplet_loss))
    before = embed(ours.network, images[unseen])
    theirs = Training(MeasuredLoss(reference.batch_hard_triplet_loss))
    with one_thread():
        ours.train(images[~unseen], digits[~unseen], steps, "deepsim_ext")
        theirs.train(images[~unseen], digits[~unseen], steps, "reference")
    after = embed(ours.network, images[unseen])

    results = {
        (when, k): verify(embeddings, digits[unseen], k)
        for when, embeddings in (("before", before), ("after", after))
        for k in (1, IMAGES_PER_SIDE)
    }
    along = relative_differences(ours.loss.values, ours.loss.expected_values).max()
    gradients_along = np.max(ours.loss.gradient_differences)
    apart = relative_differences(ours.loss.values, theirs.loss.values).max()
    large_row, large_check = _large_batch(ours, images, digits, repeats=3 if quick else 7)
    checks = [
        Check(
            "batch-hard loss on the same embeddings, relative difference", along, SAME_EMBEDDINGS_TOLERANCE
        ),
        Check(
            "its gradient on the same embeddings, relative difference",
            gradients_along,
            SAME_EMBEDDINGS_TOLERANCE,
        ),
        Check("loss curves of the two trainings, relative difference", apart, CURVES_TOLERANCE),
        large_check,
    ]
    if not quick:  # too few steps to learn
        accuracy = results["after", IMAGES_PER_SIDE].accuracy
        name = f"verification of unseen digits, {IMAGES_PER_SIDE} images a side, accuracy"
        checks.append(Check(name, accuracy, REQUIRED_ACCURACY, at_least=True))
        single, untrained = results["after", 1].accuracy, results["before", 1].accuracy
        name = f"the same, 1 image a side, gained by training ({untrained:.3f} to {single:.3f})"
        checks.append(Check(name, single - untrained, REQUIRED_GAIN, at_least=True))
    numbers = {"losses": ours.loss.values, "reference_losses": theirs.loss.values}
    for (when, k), result in results.items():
        numbers[f"{when}_training_{k}_a_side"] = {"accuracy": result.accuracy, "auc": result.auc}
    return Part(
        "Metric learning",
        rows=[_training_row(ours, apart), large_row],
        checks=checks,
        figures=[
            _plot_roc(results, output),
            _plot_losses(ours, theirs, output),
            _plot_embeddings(before, after, digits[unseen], output),
        ],
        numbers=numbers,
    )


def fit(
    network: nn.Module,
    images: Tensor,
    digits: Tensor,
    steps: int,
    name: str,
    backward: Callable[[Tensor, Tensor], float],
    max_lr: float = 3e-3,
) -> None:
    """Some steps of AdamW on classes made of the given digits.

    backward: runs the backward pass of a loss of (network output, labels) and returns the loss.
    """
    sampler = Sampler(images, digits)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=steps)
    network.train()
    with tqdm(range(steps), desc=f"metric learning, {name}", unit="step") as progress:
        for _ in progress:
            batch, labels = sampler.batch(CLASSES_PER_BATCH, IMAGES_PER_CLASS)
            optimizer.zero_grad()
            value = backward(network(batch), labels)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{value:.4f}")


class Training:
    """A network trained by one version of the loss, and the record of it."""

    def __init__(self, loss: MeasuredLoss) -> None:
        self.loss = loss
        self.network = build_network()

    def train(self, images: Tensor, digits: Tensor, steps: int, name: str) -> None:
        """Some steps on classes made of the given digits."""

        def backward(output: Tensor, labels: Tensor) -> float:
            embeddings = F.normalize(output)
            value, (gradient,) = self.loss([embeddings], lambda loss, xs: loss(xs[0], labels, margin=MARGIN))
            embeddings.backward(gradient)
            return value

        fit(self.network, images, digits, steps, name, backward)


@dataclass(frozen=True)
class Verification:
    accuracy: float
    auc: float
    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray


def verify(embeddings: Tensor, labels: Tensor, images_per_side: int, draws: int = 5) -> Verification:
    """Do two sides show the same digit? A side: the mean embedding of some images of one digit.

    Sides of several images are the templates of the IJB benchmarks; one image a side is the classic form. The
    images are cut in two halves: the threshold that is best on one is tested on the other, both ways round.
    The accuracy is the mean of that on same and on different pairs (chance: 0.5). No image is on both sides.

    Args:
        embeddings: [N, D] on the unit sphere.
        labels: int64 [N].
        images_per_side: how many images make a side.
        draws: how often the images are dealt out anew.
    """
    generator = torch.Generator().manual_seed(0)
    halves = [_pairs(embeddings[i::2], labels[i::2], images_per_side, draws, generator) for i in range(2)]
    curves = [roc_curve(same, -distances) for distances, same in halves]
    accuracies = []
    for chosen_on, (distances, same) in zip(curves, reversed(halves), strict=True):
        fpr, tpr, thresholds = chosen_on
        accepted = -distances >= thresholds[np.argmax(tpr - fpr)]
        accuracies.append((accepted[same].mean() + (~accepted[~same]).mean()) / 2)
    distances, same = (np.concatenate(parts) for parts in zip(*halves, strict=True))
    fpr, tpr, _ = roc_curve(same, -distances)
    return Verification(float(np.mean(accuracies)), float(roc_auc_score(same, -distances)), fpr, tpr)


def _pairs(
    embeddings: Tensor, labels: Tensor, images_per_side: int, draws: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of all pairs of sides, and whether each pair shows one digit."""
    distances, same = [], []
    for _ in range(draws):
        sides, digits = [], []
        for digit in labels.unique():
            mine = embeddings[labels == digit]
            count = len(mine) // images_per_side
            dealt = torch.randperm(len(mine), generator=generator)[: count * images_per_side]
            sides.append(F.normalize(mine[dealt].view(count, images_per_side, -1).mean(1)))
            digits.append(digit.repeat(count))
        distances.append(torch.pdist(torch.cat(sides)))
        all_digits = torch.cat(digits)
        i, j = torch.triu_indices(len(all_digits), len(all_digits), offset=1)
        same.append(all_digits[i] == all_digits[j])
    return torch.cat(distances).numpy(), torch.cat(same).numpy()


def _training_row(ours: Training, apart: float) -> Row:
    n = CLASSES_PER_BATCH * IMAGES_PER_CLASS
    return Row(
        "reference.batch_hard_triplet_loss",
        f"{n} x {EMBEDDING_SIZE} float64, 1 thread, in training",
        median(ours.loss.milliseconds),
        median(ours.loss.expected_milliseconds),
        peak_extra_bytes("batch_hard", "deepsim_ext", n, EMBEDDING_SIZE, "float64"),
        peak_extra_bytes("batch_hard", "reference", n, EMBEDDING_SIZE, "float64"),
        f"curves to {apart:.0e}",
    )


def _large_batch(training: Training, images: Tensor, digits: Tensor, repeats: int) -> tuple[Row, Check]:
    """All scans, over and over with other distortions, through the trained network: a usual batch size."""
    copies = torch.arange(LARGE_BATCH) % len(images)
    pictures, labels = Sampler(images, digits).distort(images[copies]), digits[copies]
    embeddings = embed(training.network, pictures).float()

    def ours(xs: list[Tensor]) -> Tensor:
        return functional.batch_hard_triplet_loss(xs[0], labels, margin=MARGIN)

    def eager(xs: list[Tensor]) -> Tensor:
        return torch_versions.batch_hard_triplet_loss(xs[0], labels, MARGIN)

    milliseconds, torch_milliseconds = median_milliseconds([ours, eager], [embeddings], repeats)
    exact = reference.batch_hard_triplet_loss(embeddings.double(), labels, margin=MARGIN).item()
    error, torch_error = (abs(loss([embeddings]).item() - exact) / exact for loss in (ours, eager))
    row = Row(
        "eager batch-hard (mm, N x N masks)",
        f"{LARGE_BATCH} x {EMBEDDING_SIZE} float32",
        milliseconds,
        torch_milliseconds,
        peak_extra_bytes("batch_hard", "deepsim_ext", LARGE_BATCH, EMBEDDING_SIZE, "float32"),
        peak_extra_bytes("batch_hard", "eager", LARGE_BATCH, EMBEDDING_SIZE, "float32"),
        f"to float64: {error:.0e}, torch {torch_error:.0e}",
    )
    return row, Check(f"loss of {LARGE_BATCH} embeddings, float32 to float64, relative", error, 1e-5)


def _plot_roc(results: dict[tuple[str, int], Verification], output: Path) -> str:
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    for (when, k), result in results.items():
        axes.plot(
            result.false_positive_rate,
            result.true_positive_rate,
            color="tab:blue" if when == "after" else "tab:gray",
            linestyle="-" if k > 1 else ":",
            label=f"{when} training, {k} image{'s' * (k > 1)} a side: {result.accuracy:.3f}",
        )
    axes.set(
        xlabel="false positive rate",
        ylabel="true positive rate",
        title="Verification of the unseen digits 7, 8, 9",
        xlim=(0, 1),
        ylim=(0, 1.005),
    )
    axes.legend(loc="lower right", title="accuracy")
    figure.savefig(output / "metric_roc.png", dpi=120)
    return "metric_roc.png"


def _plot_losses(ours: Training, theirs: Training, output: Path) -> str:
    figure = Figure(figsize=(7, 5), layout="constrained")
    curves, difference = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    curves.plot(ours.loss.values, color="tab:blue", linewidth=2.5, label="deepsim_ext")
    curves.plot(theirs.loss.values, color="tab:orange", linewidth=0.8, label="reference")
    curves.axhline(MARGIN, color="tab:gray", linestyle=":", label="margin (loss of a collapsed net)")
    curves.set(ylabel="batch-hard triplet loss", title="Training on the digits 0-6")
    curves.legend()
    # what is equal to the last bit is drawn at the bottom
    apart = np.maximum(relative_differences(ours.loss.values, theirs.loss.values), 1e-17)
    difference.semilogy(apart, color="tab:red", linewidth=0.9)
    difference.axhline(CURVES_TOLERANCE, color="tab:gray", linestyle=":", label="tolerance")
    difference.set(xlabel="step", ylabel="relative difference")
    difference.legend(loc="lower right")
    figure.savefig(output / "metric_loss.png", dpi=120)
    return "metric_loss.png"


def _plot_embeddings(before: Tensor, after: Tensor, digits: Tensor, output: Path) -> str:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, title, embeddings in zip(
        figure.subplots(1, 2), ("before", "after"), (before, after), strict=True
    ):
        x, y = PCA(2).fit_transform(embeddings.numpy()).T
        for digit in digits.unique().tolist():
            mine = (digits == digit).numpy()
            axes.scatter(x[mine], y[mine], s=9, alpha=0.7, label=str(digit))
        axes.set(title=f"{title} training", xticks=[], yticks=[])
    axes.legend(title="digit", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle("Embeddings of the unseen digits, first two principal components")
    figure.savefig(output / "metric_embeddings.png", dpi=120)
    return "metric_embeddings.png"
