"""What people write or install today: the same losses in plain torch and from pytorch-metric-learning.

Batch-hard functions take embeddings [N, D] and int64 labels [N] and return the mean of relu(d_ap - d_an +
margin) over the anchors that have a positive and a negative, with Euclidean distances (Hermans et al., 2017).
Style functions take sequences of features [B, C, H, W] and of target Gram matrices [1, C, C] and return the
sum over the layers of mean((F F^T / (C H W) - target)^2) (Gatys et al., 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 0.2


def batch_hard_eager(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The usual form: all distances from the Gram matrix, N x N masks, autograd."""
    gram = torch.mm(embeddings, embeddings.T)
    # Not gram.diagonal(), whose gradient the CPU compiler of torch 2.13 gets wrong.
    squared_norms = embeddings.square().sum(dim=1)
    squared = squared_norms[:, None] - 2 * gram + squared_norms[None, :]
    # sqrt has an infinite gradient at 0, which the diagonal would turn into NaN
    distances = squared.clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels[None, :]
    positives = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    d_ap = distances.masked_fill(~positives, -torch.inf).max(dim=1).values
    d_an = distances.masked_fill(same, torch.inf).min(dim=1).values
    valid = positives.any(dim=1) & ~same.all(dim=1)
    losses = torch.where(valid, F.relu(d_ap - d_an + MARGIN), 0)
    return losses.sum() / valid.sum().clamp(min=1)


def batch_hard_chunked(embeddings: Tensor, labels: Tensor, rows: int = 512) -> Tensor:
    """Mines `rows` anchors at a time, then differentiates the chosen pairs only: O(rows N) memory."""
    positives, negatives, valid = [], [], []
    with torch.no_grad():
        squared_norms = embeddings.square().sum(dim=1)
        for start in range(0, len(embeddings), rows):
            # |b|^2 - 2 a.b orders a row like the distance does
            scores = torch.addmm(squared_norms, embeddings[start : start + rows], embeddings.T, alpha=-2)
            same = labels[start : start + rows, None] == labels[None, :]
            other = same.clone()
            other.diagonal(start).fill_(False)
            positives.append(scores.masked_fill(~other, -torch.inf).argmax(dim=1))
            negatives.append(scores.masked_fill_(same, torch.inf).argmin(dim=1))
            valid.append(other.any(dim=1) & ~same.all(dim=1))
    d_ap = torch.linalg.vector_norm(embeddings - embeddings[torch.cat(positives)], dim=1)
    d_an = torch.linalg.vector_norm(embeddings - embeddings[torch.cat(negatives)], dim=1)
    is_valid = torch.cat(valid)
    losses = torch.where(is_valid, F.relu(d_ap - d_an + MARGIN), 0)
    return losses.sum() / is_valid.sum().clamp(min=1)


def pytorch_metric_learning_batch_hard() -> Callable[[Tensor, Tensor], Tensor]:
    """BatchHardMiner + TripletMarginLoss, set to compute the same loss.

    That is plain Euclidean distances and the mean over the mined triplets; their defaults are unit vectors
    and the mean over the non-zero losses.
    """
    from pytorch_metric_learning import distances, losses, miners, reducers

    distance = distances.LpDistance(normalize_embeddings=False)
    miner = miners.BatchHardMiner(distance=distance)
    loss = losses.TripletMarginLoss(margin=MARGIN, distance=distance, reducer=reducers.MeanReducer())
    return lambda embeddings, labels: loss(embeddings, labels, miner(embeddings, labels))


def gram_eager(features: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, C], divided by C H W."""
    rows = features.flatten(2)
    return torch.bmm(rows, rows.transpose(1, 2)) / (rows.shape[1] * rows.shape[2])


def style_eager(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The usual form: bmm and mse_loss for every layer, autograd."""
    layers = zip(features, targets, strict=True)
    return sum(F.mse_loss(gram_eager(f), target.expand(len(f), -1, -1)) for f, target in layers)


class _OneGemmStyle(torch.autograd.Function):
    """D = G - target is symmetric: dF = 4 / (B C^2 C H W) D F is one product; autograd of bmm adds two."""

    @staticmethod
    def forward(ctx, features: Tensor, target: Tensor) -> Tensor:
        difference = gram_eager(features) - target
        ctx.save_for_backward(features, difference)
        return difference.square().mean()

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        features, difference = ctx.saved_tensors
        rows = features.flatten(2)
        scale = 4 / (difference.numel() * rows.shape[1] * rows.shape[2])
        return torch.bmm(difference * (scale * grad_output), rows).view_as(features), None


def style_one_gemm(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """What a careful user writes by hand: full Gram matrix forward, one product backward."""
    return sum(_OneGemmStyle.apply(f, target) for f, target in zip(features, targets, strict=True))
