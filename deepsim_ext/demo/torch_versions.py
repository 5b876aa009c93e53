"""The two losses the way they are usually written in eager PyTorch: what deepsim_ext replaces.

Not what it is checked against (that is `deepsim_ext.reference`, which takes direct differences): these keep
the usual idioms with their cost (N x N matrices and masks; one product per Gram matrix forward, two backward)
and their rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_distances(embeddings: Tensor) -> Tensor:
    """Euclidean distances [N, N] of [N, D] by ||a||^2 - 2 a.b + ||b||^2, which cancels for close rows."""
    products = embeddings @ embeddings.T
    squared_norms = products.diagonal()
    squared = (squared_norms[:, None] - 2.0 * products + squared_norms[None, :]).clamp_min(0.0)
    zero = squared == 0.0  # the square root has no finite slope there
    return torch.sqrt(squared + 1e-16 * zero) * ~zero


def batch_hard_triplet_loss(embeddings: Tensor, labels: Tensor, margin: float, soft: bool = False) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., 2017), Euclidean, by N x N distances and masks.

    As in sentence-transformers' `BatchHardTripletLoss`, an anchor without a positive counts with d_ap = 0,
    one without a negative with d_an = the largest distance of its row. Where every label occurs at least
    twice and there are at least two labels, this is the "mean" of `deepsim_ext.batch_hard_triplet_loss`.

    Args:
        embeddings: [N, D], floating point, N >= 1.
        labels: int64 [N].
        margin: of relu(d_ap - d_an + margin); unused when soft.
        soft: softplus(d_ap - d_an) instead.
    """
    distances = pairwise_distances(embeddings)
    same = labels[:, None] == labels[None, :]
    self_pair = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    d_ap = (distances * (same & ~self_pair)).amax(dim=1)
    d_an = (distances + distances.amax(dim=1, keepdim=True) * same).amin(dim=1)
    losses = F.softplus(d_ap - d_an) if soft else F.relu(d_ap - d_an + margin)
    return losses.mean()


def gram_matrix(features: Tensor) -> Tensor:
    """Gram matrices [B, C, C] of [B, C, H, W], divided by C H W (Johnson et al., 2016)."""
    b, c, h, w = features.shape
    flat = features.view(b, c, h * w)
    return torch.bmm(flat, flat.transpose(1, 2)) / (c * h * w)


def style_loss(features: Sequence[Tensor], targets: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum over layers of the mean squared difference of Gram matrices, as in Johnson et al., 2016.

    Equals `deepsim_ext.style_loss` with its defaults.

    Args:
        features: one [B, C, H, W] per layer, contiguous.
        targets: one Gram matrix [B, C, C] per layer.
        weights: one factor per layer.
    """
    losses = [F.mse_loss(gram_matrix(f), target) for f, target in zip(features, targets, strict=True)]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
