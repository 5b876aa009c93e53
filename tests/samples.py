"""The inputs that value tests, gradient tests, opcheck and benchmarks share, drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DISTANCES = ("euclidean", "sqeuclidean", "cosine")
TRIPLET_REDUCTIONS = ("mean", "mean_nonzero", "sum", "none")
# Of batch_hard_samples: all that opcheck can tell apart, which looks at shapes, sizes of 1 and what is None.
FORMS = ("pairs", "one_row", "reference_set")

# VGG19's style layers: channels, and the factor by which height and width are smaller than the picture's.
VGG19_LAYERS = {
    "conv1_1": (64, 1),
    "conv2_1": (128, 2),
    "conv3_1": (256, 4),
    "conv4_1": (512, 8),
    "conv5_1": (512, 16),
}


def balanced_labels(n: int, per_class: int, generator: torch.Generator | None = None) -> Tensor:
    """int64 [n]: classes of `per_class` (P x K sampling) in random order."""
    return (torch.arange(n) // per_class)[torch.randperm(n, generator=generator)]


@dataclass
class Sample:
    """Tensor arguments of one call, by position, and its options."""

    name: str
    tensors: list[Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)

    def fresh(self, requires_grad: bool = False) -> list[Tensor | None]:
        """The tensors as new leaves; floating ones require grad if asked."""
        return [
            t if t is None else t.detach().clone().requires_grad_(requires_grad and t.is_floating_point())
            for t in self.tensors
        ]

    def __str__(self) -> str:
        return self.name


def batch_hard_samples(dtype: torch.dtype = torch.float64, small: bool = False) -> Iterator[Sample]:
    """Batches for mining and the triplet loss: (embeddings, labels, ref_embeddings, ref_labels).

    `small` keeps to what gradcheck can walk through element by element.
    """
    g = torch.Generator().manual_seed(20)

    def points(n: int, d: int, shift: float = 0.0) -> Tensor:
        return (torch.randn(n, d, generator=g, dtype=torch.float64) + shift).to(dtype)

    def labels(n: int, classes: int) -> Tensor:
        return torch.randint(classes, (n,), generator=g)

    yield Sample("pairs", [points(10, 3), labels(10, 3), None, None])
    yield Sample("one_column", [points(9, 1), labels(9, 3), None, None])
    yield Sample("one_class", [points(6, 4), torch.zeros(6, dtype=torch.int64), None, None])
    yield Sample("all_singletons", [points(6, 4), torch.arange(6), None, None])
    yield Sample("one_row", [points(1, 4), torch.zeros(1, dtype=torch.int64), None, None])
    yield Sample("big_labels", [points(12, 4), labels(12, 3) * 2**40 - 2**41, None, None])
    yield Sample("reference_set", [points(8, 4), labels(8, 3), points(11, 4), labels(11, 3)])
    yield Sample("strangers", [points(5, 4), labels(5, 2), points(7, 4), labels(7, 2) + 2])
    if small:
        return
    yield Sample("no_rows", [points(0, 4), labels(0, 3), None, None])
    yield Sample("no_references", [points(5, 4), labels(5, 2), points(0, 4), labels(0, 2)])
    yield Sample("zero_rows", [points(9, 4) * (torch.arange(9) % 3 > 0)[:, None], labels(9, 3), None, None])
    yield Sample("duplicates", [points(8, 5).repeat(5, 1), labels(8, 3).repeat(5), None, None])
    yield Sample("strided", [points(60, 40)[::3, ::5], labels(40, 4)[::2], None, None])
    yield Sample("rows_and_more", [points(33, 17), labels(33, 5), None, None])
    # Several panels and tiles, ragged edges, more than one block of the depth.
    yield Sample("tiles", [points(261, 150), balanced_labels(261, 4, g), None, None])
    yield Sample("few_big_classes", [points(270, 24), labels(270, 3), None, None])
    yield Sample("heavy_imbalance", [points(260, 20), (labels(260, 60) - 40).clamp(min=0), None, None])
    offset = 100.0 if dtype in (torch.float32, torch.float64) else 4.0
    yield Sample("offset", [points(200, 33, offset), balanced_labels(200, 5, g), None, None])
    yield Sample(
        "reference_tiles", [points(130, 40, 1.0), labels(130, 30), points(260, 40, 1.0), labels(260, 30)]
    )


def feature_shapes(small: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of features: 1D, 2D and 3D, ragged against every panel and slice."""
    yield "one_channel", (1, 1, 5)
    yield "audio", (2, 3, 5)
    yield "picture", (2, 3, 2, 4)
    yield "volume", (1, 3, 2, 2, 2)
    if small:
        return
    yield "single_position", (3, 5, 1, 1)
    yield "ragged", (2, 70, 31, 37)
    yield "panels", (1, 128, 40, 40)
    yield "slices", (1, 33, 5000)


def style_samples(dtype: torch.dtype = torch.float64, small: bool = False) -> Iterator[Sample]:
    """Features and targets for style_loss: ([B, C, *spatial], [C, C] or [1, C, C] or [B, C, C])."""
    g = torch.Generator().manual_seed(21)
    for name, shape in feature_shapes(small):
        features = torch.randn(shape, generator=g, dtype=torch.float64).relu().to(dtype)
        b, c, *spatial = shape
        target_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        for kind, target_shape in (("shared", (c, c)), ("one", (1, c, c)), ("each", (b, c, c))):
            target = torch.randn(target_shape, generator=g, dtype=torch.float64).to(target_dtype) / c
            yield Sample(f"{name}-{kind}", [features, target])
        if len(spatial) == 2:
            channels_last = features.to(memory_format=torch.channels_last)
            yield Sample(f"{name}-channels_last", [channels_last, target])
        yield Sample(f"{name}-strided", [features.repeat_interleave(2, -1)[..., ::2], target])
