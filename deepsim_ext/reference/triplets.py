"""What the losses of a batch have in common: pairs by label, the loss of a triplet, means, statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..results import TripletLossResult
from .finite import nan_unless_finite


class Triplets(NamedTuple):
    """Triplets that a loss may look at; tensors of one shape."""

    loss: Tensor  # 0 where not counted
    counted: Tensor  # bool: whether the loss looks at it
    d_ap: Tensor  # 0 where not counted
    d_an: Tensor  # 0 where not counted


def pairs_by_label(labels: Tensor, ref_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(positive, negative): bool [N, M], whether a pair has one label or two; no row pairs with itself."""
    self_form = ref_labels is None
    same = labels[:, None] == (labels if self_form else ref_labels)[None, :]
    if not self_form:
        return same, ~same
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def has_both(positive: Tensor, negative: Tensor) -> Tensor:
    """bool [N]: which anchors have a positive and a negative."""
    return positive.any(dim=1) & negative.any(dim=1)


def first_argmax(values: Tensor, allowed: Tensor) -> Tensor:
    """Column of each row's largest allowed value in [N, M], the lowest on ties; -1 where none is allowed."""
    n, m = values.shape
    if m == 0:
        return torch.full((n,), -1, dtype=torch.int64, device=values.device)
    best = torch.where(allowed, values, -torch.inf).amax(dim=1, keepdim=True)
    columns = torch.arange(m, device=values.device)
    first = torch.where(allowed & (values == best), columns, m).amin(dim=1)
    return torch.where(first == m, -1, first)


def choose(
    d: Tensor, among_positives: Tensor, among_negatives: Tensor, positive: str, negative: str
) -> tuple[Tensor, Tensor]:
    """(positives, negatives): for each row of the distances d [N, M] one column each, -1 where there is none.

    A "hard" positive is the farthest and a "hard" negative the nearest, "easy" is the reverse. "semihard",
    chosen after the other of the two, is the hardest that leaves the negative farther than the positive.
    Ties go to the lowest column.
    """
    if positive != "semihard":
        positives = first_argmax(-d if positive == "easy" else d, among_positives)
        if negative == "semihard":
            among_negatives = among_negatives & (d > _entries(d, positives))
    negatives = first_argmax(d if negative == "easy" else -d, among_negatives)
    if positive == "semihard":
        positives = first_argmax(d, among_positives & (d < _entries(d, negatives)))
    return positives, negatives


def _entries(values: Tensor, columns: Tensor) -> Tensor:
    """[N, 1]: each row's entry of [N, M] in its column; without meaning where that is -1."""
    n, m = values.shape
    return values.new_zeros(n, 1) if m == 0 else values.gather(1, columns.clamp(min=0)[:, None])


def triplet_loss(d_ap: Tensor, d_an: Tensor, margin: float, soft: bool) -> Tensor:
    if soft:
        # Beyond the threshold softplus(z) is taken to be z; exp(-40) is below the rounding of a float64.
        return torch.nn.functional.softplus(d_ap - d_an, threshold=40)
    return (d_ap - d_an + margin).relu()


def triplet_terms(d_ap: Tensor, d_an: Tensor, counted: Tensor, margin: float, soft: bool) -> Triplets:
    """Triplets with their losses; the shapes of the arguments broadcast."""
    terms = (triplet_loss(d_ap, d_an, margin, soft), d_ap, d_an)
    loss, d_ap, d_an = (torch.where(counted, x, 0) for x in terms)
    return Triplets(loss, counted, d_ap, d_an)


def reduce(loss: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """ "mean" over what is counted, "mean_nonzero" over losses > 0, "sum" or "none"."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    among = loss > 0 if reduction == "mean_nonzero" else counted
    return loss.sum() / among.sum().clamp(min=1)


def with_statistics(
    loss: Tensor, triplets: Triplets, valid_anchors: Tensor, *embeddings: Tensor | None
) -> TripletLossResult:
    count, active = triplets.counted.sum(), (triplets.loss > 0).sum()
    divisor = count.clamp(min=1).to(loss.dtype)
    return TripletLossResult(
        loss=loss,
        valid_anchors=valid_anchors,
        triplets=count,
        active_triplets=active,
        active_fraction=active / divisor,
        mean_d_ap=nan_unless_finite(triplets.d_ap.detach().sum() / divisor, *embeddings),
        mean_d_an=nan_unless_finite(triplets.d_an.detach().sum() / divisor, *embeddings),
    )
