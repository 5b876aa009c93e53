"""What the shells need and no fused function has: lists of pairs and triplets, and losses of what is listed.

Plain torch, in chunks of anchors: what a loss keeps for its backward pass is the embeddings, and no N x M
matrix is made but where a list of a good part of all pairs is given. Distances are as exact as direct
differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import compute_dtype
from ..pair_distances import pair_distances
from ._matrix import distance_matrix

CHUNK = 2**21  # elements of the largest tensor of pairs that a chunk of anchors makes
# On the CPU the matrix of all distances takes less time, if more memory, than lists of half of them or more,
# for cosine of a sixth.
MOST_LISTED = {"euclidean": 2, "sqeuclidean": 2, "cosine": 6}


class Batch(NamedTuple):
    """Anchors, and the rows to compare them with: in the self form, `embeddings` and `labels` themselves."""

    embeddings: Tensor  # [N, D]
    labels: Tensor | None  # int64 [N]; None where listed pairs are all that is asked for
    ref_embeddings: Tensor  # [M, D]
    ref_labels: Tensor | None  # int64 [M]
    own: Tensor | None  # int64 [N]: the one reference row that an anchor is not compared with as a positive

    @property
    def self_form(self) -> bool:
        return self.ref_embeddings is self.embeddings

    @property
    def fused(self) -> bool:
        """Whether `functional` can be asked for it."""
        return self.own is None or self.self_form

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """What `functional` is called with."""
        return (*self[:2], None, None) if self.self_form else self[:4]

    def chunks(self, elements: int) -> Iterator[Tensor]:
        """Indices of anchors, so many at a time that `elements` for each of them fit into a chunk."""
        anchors = torch.arange(len(self.embeddings), device=self.embeddings.device)
        return iter(anchors.split(max(1, CHUNK // max(1, elements))))

    def masks(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """(positive, negative): bool [len(anchors), M]."""
        same = self.labels[anchors, None] == self.ref_labels
        negative = ~same
        if self.own is not None:
            same.scatter_(1, self.own[anchors, None], False)
        return same, negative

    def most_positives(self) -> int:
        """Rows of the largest class among the references: a bound on an anchor's positives."""
        counts = torch.unique(self.ref_labels, return_counts=True)[1]
        return int(counts.max()) if len(counts) else 0

    def in_compute_dtype(self) -> Batch:
        x = self.embeddings.to(compute_dtype(self.embeddings))
        ref = x if self.self_form else self.ref_embeddings.to(x.dtype)
        return self._replace(embeddings=x, ref_embeddings=ref)


# ---- lists -------------------------------------------------------------------------------------------------


def all_pairs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(anchors, positives, anchors, negatives) of all positive and all negative pairs, in row order."""
    parts: list[list[Tensor]] = [[batch.labels.new_empty(0)] for _ in range(4)]
    for anchors in batch.chunks(len(batch.ref_labels)):
        for i, mask in enumerate(batch.masks(anchors)):
            rows, columns = mask.nonzero(as_tuple=True)
            parts[2 * i].append(anchors[rows])
            parts[2 * i + 1].append(columns)
    return tuple(torch.cat(part) for part in parts)


def as_pairs(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of the triplets (anchors, positives, negatives); pairs as they are."""
    if len(indices) == 4:
        return indices
    anchors, positives, negatives = indices
    return anchors, positives, anchors, negatives


def as_triplets(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """All triplets that pairs (anchors, positives, anchors, negatives) form; triplets as they are."""
    if len(indices) == 3:
        return indices
    anchors, positives, negative_anchors, negatives = indices
    negative_anchors, order = negative_anchors.sort(stable=True)
    first = torch.searchsorted(negative_anchors, anchors)
    count = torch.searchsorted(negative_anchors, anchors, right=True) - first
    pair = torch.arange(len(anchors), device=anchors.device).repeat_interleave(count)
    nth = torch.arange(len(pair), device=anchors.device) - (count.cumsum(0) - count)[pair]
    return anchors[pair], positives[pair], negatives[order[first[pair] + nth]]


def without_own(indices: tuple[Tensor, ...], own: Tensor) -> tuple[Tensor, ...]:
    """Pairs or triplets less those whose positive is the anchor's own row."""
    keep = own[indices[0]] != indices[1]
    if len(indices) == 3:
        return tuple(i[keep] for i in indices)
    return indices[0][keep], indices[1][keep], indices[2], indices[3]


def sampled_triplets(batch: Batch, per_anchor: int) -> tuple[Tensor, Tensor, Tensor]:
    """`per_anchor` triplets for every anchor that has any, positive and negative drawn with replacement."""
    labels, ref_labels, own = batch.labels, batch.ref_labels, batch.own
    sorted_labels, order = ref_labels.sort(stable=True)
    first = torch.searchsorted(sorted_labels, labels)
    same = torch.searchsorted(sorted_labels, labels, right=True) - first
    # Sorted by label, the positives of an anchor are one run, in which its own row is skipped.
    skipped = torch.full_like(first, len(order))
    if own is not None:
        skipped = torch.where(ref_labels[own] == labels, order.argsort()[own], skipped)
    positives = same - (skipped < len(order)).long()
    anchors = ((positives > 0) & (same < len(order))).nonzero().squeeze(1).repeat_interleave(per_anchor)

    def draw(count: Tensor) -> Tensor:
        drawn = torch.rand(len(count), device=count.device, dtype=torch.float64)
        return (drawn * count).long().minimum(count - 1)

    p = first[anchors] + draw(positives[anchors])
    n = draw(len(order) - same[anchors])
    p = p + (p >= skipped[anchors]).long()
    n = n + torch.where(n >= first[anchors], same[anchors], 0)
    return anchors, order[p], order[n]


# ---- losses ------------------------------------------------------------------------------------------------


def listed_distances(
    x: Tensor, ref: Tensor, lists: Sequence[tuple[Tensor, Tensor]], distance: str
) -> list[Tensor]:
    """For each list (i, j) of indices [T], the distances [T] between the rows x[i] and ref[j]."""
    i, j = (torch.cat(indices) for indices in zip(*lists, strict=True))
    dtype = torch.promote_types(x.dtype, ref.dtype)
    x, ref = x.to(dtype), ref.to(dtype)
    if x.device.type == "cpu" and MOST_LISTED[distance] * len(i) >= len(x) * len(ref):
        dtype = compute_dtype(x)
        found = distance_matrix(x.to(dtype), ref.to(dtype), distance)[i, j]
    else:
        i, j = (torch.where(k < 0, k + len(rows), k) for k, rows in ((i, x), (j, ref)))  # as torch indexes
        found = pair_distances(x, ref, i, j, distance=distance)
    return list(found.split([len(i) for i, _ in lists]))


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Sum of [T] losses, or their "mean", or their "mean_nonzero" over losses > 0; 0 of nothing."""
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean_nonzero":
        return losses.sum() / (losses > 0).sum().clamp(min=1)
    return losses.sum() / max(len(losses), 1)


def all_triplets_loss(
    batch: Batch, loss: Callable[[Tensor], Tensor], *, swap: bool, distance: str, reduction: str
) -> Tensor:
    """`loss(d_ap - d_an)` of all triplets, reduced; `swap`: of d_an and d_pn the smaller."""
    batch = batch.in_compute_dtype()

    def terms(x: Tensor, ref: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positive, negative = batch.masks(anchors)
        d = distance_matrix(x[anchors], ref, distance)
        a, p = positive.nonzero(as_tuple=True)
        d_an = d[a]
        if swap:
            d_an = d_an.minimum(distance_matrix(ref[p], ref, distance))
        losses = torch.where(negative[a], loss(d[a, p, None] - d_an), 0)
        return losses.sum(), (losses > 0).sum(), negative[a].sum()

    elements = batch.most_positives() * len(batch.ref_labels)
    total, nonzero, count = _add_up(batch, terms, elements)
    if reduction == "sum":
        return total
    return total / (nonzero if reduction == "mean_nonzero" else count).clamp(min=1)


def all_pairs_loss(
    batch: Batch,
    positive_loss: Callable[[Tensor], Tensor],
    negative_loss: Callable[[Tensor], Tensor],
    *,
    distance: str,
    reduction: str,
) -> Tensor:
    """The losses of all positive pairs, reduced, plus those of all negative pairs, reduced."""
    batch = batch.in_compute_dtype()

    def terms(x: Tensor, ref: Tensor, anchors: Tensor) -> tuple[Tensor, ...]:
        d = distance_matrix(x[anchors], ref, distance)
        sums = []
        for mask, loss in zip(batch.masks(anchors), (positive_loss, negative_loss), strict=True):
            losses = torch.where(mask, loss(d), 0)
            sums += [losses.sum(), (losses > 0).sum(), mask.sum()]
        return tuple(sums)

    sums = _add_up(batch, terms, len(batch.ref_labels))
    if reduction == "sum":
        return sums[0] + sums[3]
    divisors = (sums[1], sums[4]) if reduction == "mean_nonzero" else (sums[2], sums[5])
    return sums[0] / divisors[0].clamp(min=1) + sums[3] / divisors[1].clamp(min=1)


def _add_up(batch: Batch, terms: Callable[..., tuple[Tensor, ...]], elements: int) -> list[Tensor]:
    """Sums over chunks of anchors of the scalars that `terms` gives, the first of them a loss."""
    x, ref = batch.embeddings, batch.ref_embeddings
    # The gradient of torch.cdist is a tensor of all differences there: of up to some 2^26 elements, then.
    if x.device.type != "cpu":
        elements *= max(1, x.shape[1] // 32)
    chunks = _in_turn(terms, x, ref, [(anchors,) for anchors in batch.chunks(elements)])
    loss, *others = (torch.stack(sums).sum() for sums in zip(*chunks, strict=True))
    return [loss + nothing(x) + nothing(ref), *others]


def nothing(x: Tensor) -> Tensor:
    """0, connected to x; NaN where x is not finite."""
    return (x.to(compute_dtype(x)) * 0).sum()


def _in_turn(function: Callable, x: Tensor, ref: Tensor, chunks: list[tuple[Tensor, ...]]) -> list:
    """`function(x, ref, *chunk)` of every chunk. Of several, the backward pass computes each once more."""
    if len(chunks) == 1:
        return [function(x, ref, *chunks[0])]
    options = {"use_reentrant": False, "preserve_rng_state": False}
    return [checkpoint(function, x, ref, *chunk, **options) for chunk in chunks]
