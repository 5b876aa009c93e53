"""Every loss of a batch, called by `deepsim_ext.functional` and the way users of pytorch-metric-learning do.

The network of `metric_learning` learns by each of them, and has to verify the digits that it never saw. Both
ways stand for the same loss: batch-hard, batch-all, and all triplets inside the margin ("semi-hard"), each as
the mean over losses above 0, and the contrastive loss of all pairs. The one never lists a triplet, the other
mines lists of them.

The network runs in float32, as networks do; the losses in float64, where both ways must agree on the same
embeddings to rounding. Accuracies may differ a little: a training step multiplies the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from .._threads import one_thread
from ..compat.pytorch_metric_learning import (
    BatchEasyHardMiner,
    BatchHardMiner,
    ContrastiveLoss,
    TripletMarginLoss,
    TripletMarginMiner,
)
from .digits import build_network, embed, load_images
from .metric_learning import (
    IMAGES_PER_SIDE,
    SAME_EMBEDDINGS_TOLERANCE,
    TRAINED_DIGITS,
    fit,
    verify,
)
from .report import Check, MeasuredLoss, Part, markdown_table, relative_differences

MARGIN, NEG_MARGIN = 0.1, 1.0
REQUIRED_GAIN = 0.01  # in accuracy, the mean of all trainings
FUNCTIONAL, COMPAT = "functional", "compat.pytorch_metric_learning"

Loss = Callable[[Tensor, Tensor], Tensor]


def functional_losses() -> dict[str, Loss]:
    """By name, losses of (network output, labels)."""
    return {
        "batch-hard": lambda x, labels: functional.batch_hard_triplet_loss(
            F.normalize(x), labels, margin=MARGIN, reduction="mean_nonzero"
        ),
        "semi-hard": lambda x, labels: functional.batch_semi_hard_triplet_loss(
            F.normalize(x), labels, margin=MARGIN, definition="pml", reduction="mean_nonzero"
        ),
        "batch-all": lambda x, labels: functional.batch_all_triplet_loss(
            F.normalize(x), labels, margin=MARGIN
        ),
        "contrastive": lambda x, labels: functional.batch_contrastive_loss(
            F.normalize(x), labels, neg_margin=NEG_MARGIN
        ),
    }


def compat_losses() -> dict[str, Loss]:
    """The same losses with miners; as pytorch-metric-learning's, they normalise embeddings themselves."""
    triplet_loss, contrastive_loss = TripletMarginLoss(margin=MARGIN), ContrastiveLoss(neg_margin=NEG_MARGIN)

    def mined(loss_func: Callable[..., Tensor], miner: Callable[..., tuple[Tensor, ...]]) -> Loss:
        return lambda embeddings, labels: loss_func(embeddings, labels, miner(embeddings, labels))

    return {
        "batch-hard": mined(triplet_loss, BatchHardMiner()),
        "semi-hard": mined(triplet_loss, TripletMarginMiner(MARGIN, type_of_triplets="semihard")),
        "batch-all": mined(triplet_loss, TripletMarginMiner(MARGIN, type_of_triplets="all")),
        "contrastive": mined(contrastive_loss, BatchEasyHardMiner("all", "all")),
    }


def run(output: Path, *, quick: bool = False) -> Part:
    """Trains by every loss in both ways, and compares."""
    images, digits = load_images()
    images, unseen = images.float(), digits >= TRAINED_DIGITS
    steps = 5 if quick else 300

    def accuracies(embeddings: Tensor) -> list[float]:
        """With one image a side, and with several."""
        return [verify(embeddings, digits[unseen], k).accuracy for k in (1, IMAGES_PER_SIDE)]

    def train(name: str, loss: MeasuredLoss) -> list[float]:
        def backward(embeddings: Tensor, labels: Tensor) -> float:
            value, (gradient,) = loss([embeddings.double()], lambda loss, xs: loss(xs[0], labels))
            embeddings.backward(gradient.to(embeddings.dtype))
            return value

        network = build_network().float()
        fit(network, images[~unseen], digits[~unseen], steps, name, backward, max_lr=5e-4)
        return accuracies(embed(network, images[unseen]))

    untrained = accuracies(embed(build_network().float(), images[unseen]))
    rows: list[tuple[str, str, list[float]]] = []
    apart: list[float] = []
    with one_thread():
        for (name, ours), theirs in zip(functional_losses().items(), compat_losses().values(), strict=True):
            both = MeasuredLoss(ours, theirs)
            rows.append((name, FUNCTIONAL, train(f"{name}, {FUNCTIONAL}", both)))
            rows.append((name, COMPAT, train(f"{name}, {COMPAT}", MeasuredLoss(theirs))))
            apart += [*relative_differences(both.values, both.expected_values), *both.gradient_differences]

    check = f"losses and gradients by {FUNCTIONAL} and by {COMPAT}, relative difference"
    checks = [Check(check, np.max(apart), SAME_EMBEDDINGS_TOLERANCE)]
    if not quick:  # too few steps to learn
        gain = np.mean([single for *_, (single, _) in rows]) - untrained[0]
        check = "verification of unseen digits, 1 image a side, gained by training, mean of all losses"
        checks.append(Check(check, gain, REQUIRED_GAIN, at_least=True))
    header = ["loss", "called by", "1 image a side", f"{IMAGES_PER_SIDE} images a side"]
    cells = [
        [*names, *(f"{a:.3f}" for a in values)] for *names, values in [("untrained", "", untrained), *rows]
    ]
    caption = f"Verification of the unseen digits 7, 8, 9 after {steps} steps by each loss, accuracy:"
    return Part(
        "Every loss, called in two ways",
        checks=checks,
        tables=[f"{caption}\n\n{markdown_table([header, *cells], numeric=(2, 3))}"],
        numbers={"untrained": untrained, "accuracies": rows},
    )
