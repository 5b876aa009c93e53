"""What a block of rows adds to the batch-all loss of anchors that bring the distances of their positives."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import compute_dtype
from .distances import unit_rows, zero_rows
from .given_lists import comparable, stripes


@torch.no_grad()
def batch_all_negatives(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor,
    ref_labels: Tensor,
    begin: Tensor,
    positives: Tensor,
    margin: float,
    semi_hard: bool,
    center: Tensor | None,
    distance: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and sums of the block's triplets, and the gradients by its distances.

    Arguments and result are those of `deepsim_ext.batch_all_negatives.batch_all_negatives`; memory beyond
    them is 2^20 distances and what comes with them.
    """
    x, refs = (t.to(compute_dtype(t)) for t in (embeddings, ref_embeddings))
    sums = torch.zeros(4, dtype=torch.float64, device=x.device)
    active = torch.zeros_like(positives)
    grad, grad_ref = (torch.zeros_like(t if with_gradient else t[:0]) for t in (x, refs))
    a, b = _points(x, refs, center, distance)
    for s in stripes(embeddings, labels, ref_embeddings, ref_labels, begin, positives, distance):
        negatives = s.ascending.isfinite().sum(dim=1, keepdim=True)
        limit = torch.where(s.filled, s.positives + margin, -torch.inf)
        # The run of negatives that a positive is active with: d_an < d_ap + margin and, if semi-hard, > d_ap.
        first = torch.searchsorted(s.ascending, s.positives, right=True) if semi_hard else s.elements * 0
        last = torch.searchsorted(s.ascending, limit).clamp(min=first)
        end = (
            torch.searchsorted(s.ascending, limit, right=True).minimum(negatives) if semi_hard else negatives
        )
        runs = [(first, torch.where(s.filled, end, first)), (first, last)]  # looked at, active
        on_each = [_covered(*run, s.order.shape[1]) for run in runs]
        d = s.ascending.nan_to_num(posinf=0.0).double()
        sums += torch.stack([*(n.sum() for n in on_each), *((n * d).sum() for n in on_each)])
        active[s.elements[s.filled]] = (last - first)[s.filled].to(active.dtype)
        if not with_gradient:
            continue
        # In the order of the block, by the derivative of each distance.
        count = torch.zeros_like(s.distances).scatter_(1, s.order, on_each[1].to(x.dtype))[:, :-1]
        strength = -count * _slope(s.distances[:, :-1], distance)
        if distance == "cosine":
            strength = strength.masked_fill(zero_rows(x[s.rows])[:, None] | zero_rows(refs), 0)
        grad[s.rows] = _pull(strength, a[s.rows], b)
        grad_ref += _pull(strength.T, b, a[s.rows])
    if with_gradient and distance == "cosine":
        grad, grad_ref = _by_row(grad, x, a), _by_row(grad_ref, refs, b)
    right = comparable(embeddings, ref_embeddings, distance)
    right = right & (positives <= torch.finfo(positives.dtype).max / 2).all()
    results = (torch.where(right, t, torch.nan) for t in (sums, active, grad, grad_ref))
    return tuple(results)


def _covered(begin: Tensor, end: Tensor, positions: int) -> Tensor:
    """int64 [R, positions]: how many of each row's runs [begin, end), [R, L] each, a position lies in."""
    change = begin.new_zeros(len(begin), positions + 1)
    one = torch.ones_like(begin)
    change.scatter_add_(1, begin, one).scatter_add_(1, end.expand_as(begin), -one)
    return change.cumsum(dim=1)[:, :-1]


def _points(x: Tensor, refs: Tensor, center: Tensor | None, distance: str) -> tuple[Tensor, Tensor]:
    """Rows whose differences are the direction of the gradient, near the origin to keep their digits."""
    if distance == "cosine":
        return unit_rows(x), unit_rows(refs)
    shift = (refs if len(refs) else x).mean(dim=0) if center is None else center.to(x)
    return x - shift, refs - shift


def _slope(d: Tensor, distance: str) -> Tensor:
    """s with: the gradient of d = |a - b| (or its square, or half of it) is s (a - b); 0 where d is 0."""
    if distance == "euclidean":
        return torch.where(d == 0, 0.0, 1 / d)
    return torch.full_like(d, 2.0 if distance == "sqeuclidean" else 1.0)


def _pull(strength: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[R, D]: sum over j of strength[:, j] (a - b[j])."""
    # The two cancel: neither autocast nor TF32, which leave float64 alone, may round one of them.
    exact = strength.double()
    return (exact.sum(dim=1, keepdim=True) * a - exact @ b.double()).to(a.dtype)


def _by_row(grad: Tensor, x: Tensor, unit: Tensor) -> Tensor:
    """The gradient by the rows x from that by their unit vectors; 0 for a zero row."""
    length = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
    across = grad - (grad * unit).sum(dim=1, keepdim=True) * unit
    return (across / torch.where(length == 0, 1.0, length)).to(x.dtype)
