"""Heads of Siamese networks: from two embeddings to a distance or to the chance that they belong together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from .._checks import heads as checks
from .._checks.tensors import check_embeddings
from ..reference.distances import unit_rows, zero_rows


class SiameseDistance(nn.Module):
    """Squared Euclidean distance `d = ||x1 - x2||^2` of each pair, by direct differences.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet" (2015), section 3.
    """

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Distances of pairs.

        Args:
            x1, x2: [N, D] with D >= 1; float32, float64, bfloat16 or float16, of one dtype (under autocast a
                mix goes to the widest).

        Returns:
            [N], float32 or, for float64 input, float64.

        Raises:
            TypeError: an argument of the wrong Python type or dtype.
            ValueError: shapes or devices that do not go together.
        """
        x1, x2 = checks.embedding_pairs("SiameseDistance", x1, x2)
        return (x1 - x2).square().sum(dim=1)


class SiameseHead(nn.Module):
    """Chance that two embeddings belong together, by a weighted distance: `sigmoid(sum_k w_k f_k + b)`.

    With `mode="abs"`, `f_k = |x1_k - x2_k|`: Koch, Zemel, Salakhutdinov, "Siamese Neural Networks for
    One-shot Image Recognition" (2015), section 3.1. With `mode="chi2"`, `f_k = (x1_k - x2_k)^2 / (x1_k +
    x2_k)`: Taigman, Yang, Ranzato, Wolf, "DeepFace" (2014), section 4.1.

    A call returns the logits, which train with `torch.nn.functional.binary_cross_entropy_with_logits` (1: the
    same) without the overflow of a sigmoid before a logarithm; `probability` returns their sigmoid.

    chi2 is for features >= 0, such as those after a ReLU. Where both are 0, so are f_k and its gradient. With
    features < 0 the formula is taken at its word: f_k is negative where the sum is, without bounds near the
    sum 0, and inf at it.

    Args:
        embedding_size: D, of the embeddings.
        mode: "abs" or "chi2".

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: unknown mode, or `embedding_size` < 1.
    """

    def __init__(self, embedding_size: int, *, mode: str = "abs") -> None:
        super().__init__()
        self.mode = mode
        self.embedding_size = checks.head_options(
            type(self).__name__, embedding_size=embedding_size, mode=mode
        )
        self.weight = nn.Parameter(torch.empty(self.embedding_size))
        self.bias = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Farther is less alike from the start: the mean of |x1_k - x2_k|, taken from 0."""
        nn.init.constant_(self.weight, -1 / self.embedding_size)
        nn.init.zeros_(self.bias)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Logits of pairs.

        Args:
            x1, x2: [N, embedding_size]; float32, float64, bfloat16 or float16, of one dtype (under autocast a
                mix goes to the widest).

        Returns:
            [N], float32 or, for float64 input, float64; half inputs and weights are computed in float32, also
            under autocast.

        Raises:
            TypeError: an argument of the wrong Python type or dtype.
            ValueError: shapes or devices that do not go together.
        """
        x1, x2 = checks.embedding_pairs(type(self).__name__, x1, x2, self.embedding_size)
        difference = x1 - x2
        if self.mode == "abs":
            features = difference.abs()
        else:
            empty = (x1 == 0) & (x2 == 0)
            # As a ratio times a difference: the square of a small feature underflows.
            features = difference * (difference / torch.where(empty, 1.0, x1 + x2))
        weight, bias = self.weight.to(x1.dtype), self.bias.to(x1.dtype)
        return (features * weight).sum(dim=1) + bias

    def probability(self, x1: Tensor, x2: Tensor) -> Tensor:
        """`sigmoid` of the logits, [N], from 0 (different) to 1 (the same)."""
        return self(x1, x2).sigmoid()

    def extra_repr(self) -> str:
        return f"{self.embedding_size}, mode={self.mode!r}"


class L2Normalize(nn.Module):
    """Scales each row to length 1: `x / ||x||`.

    A row of zeros stays zero, with zero gradient. Every other row, however small or large, has length 1: rows
    are scaled by their largest entry before they are squared, so there is no epsilon.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet" (2015), section 3.1: embeddings on the unit sphere.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Unit rows.

        Args:
            x: [N, D] with D >= 1; float32, float64, bfloat16 or float16.

        Returns:
            [N, D] of the dtype of `x`; half inputs are computed in float32. A NaN or inf makes its row NaN.

        Raises:
            TypeError: `x` of the wrong Python type or dtype.
            ValueError: another shape.
        """
        check_embeddings("L2Normalize", "x", x, "[N, D]")
        wide = x.to(_checks.compute_dtype(x))
        return torch.where(zero_rows(wide)[:, None], 0.0, unit_rows(wide)).to(x.dtype)
