"""One-shot recognition of digits that were never seen: learn from five of them, tell the other five apart.

    python -m deepsim_ext.examples.digits_one_shot

Each seed draws its own five digits to learn from. Then every other digit shows a single scan, and each of the
remaining scans is given to the nearest of the five: chance is 20 %. Besides, pairs of scans are asked whether
they show the same digit. Needs the extra `deepsim-ext[eval]`.

The loss is the contrastive one of all pairs of a batch, as of a Siamese network (Hadsell et al. 2006).
The classes of a batch are those of the demo, halves of digits put together, and more of them: turned and
mirrored ones. Without the mirrored there are too few classes to learn from, and next to nothing is gained.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._threads import one_thread
from ..demo.digits import Sampler, build_network, embed, load_images
from ..functional import batch_contrastive_loss
from . import _runs

SEEN = 5  # digits to learn from
CLASSES_PER_BATCH, IMAGES_PER_CLASS = 32, 2
STEPS = 400


def train(network: nn.Module, images: Tensor, digits: Tensor, seed: int, steps: int = STEPS) -> None:
    """Teaches a network the scans [N, 1, 8, 8] of digits, int64 [N]."""
    sampler = Sampler(images, digits, seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        batch, labels = sampler.batch(CLASSES_PER_BATCH, IMAGES_PER_CLASS)
        batch = mirrored(batch, labels, sampler.generator)
        loss = batch_contrastive_loss(F.normalize(network(batch)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def mirrored(images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """The images [N, 1, H, W], those of a label all as they are, mirrored, upside down, or both."""
    _, classes = labels.unique(return_inverse=True)
    for axis in (2, 3):
        flips = torch.rand(len(labels), generator=generator)[classes] < 0.5
        images = torch.where(flips[:, None, None, None], images.flip(axis), images)
    return images


def run(seed: int, steps: int = STEPS) -> dict[str, _runs.Scores]:
    """The scores on five digits of a network that learnt the others, and of what it has to beat."""
    images, digits = load_images()
    images = images.float()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    seen = torch.isin(digits, order[:SEEN])
    network = build_network(seed).float()
    unseen, labels = images[~seen], digits[~seen]
    with one_thread():
        scores = {
            "pixels": _runs.score(unseen.flatten(1), labels),
            "untrained network": _runs.score(embed(network, unseen), labels),
        }
        train(network, images[seen], digits[seen], seed, steps)
        return scores | {"trained network": _runs.score(embed(network, unseen), labels)}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the scores over some seeds; exit code 0, or 1 for a missing package."""
    return _runs.main("digits_one_shot", "One-shot recognition of digits that were never seen.", run, argv)


if __name__ == "__main__":
    sys.exit(main())
