"""Pairs of rows: drawn from labels, and their distances."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from .._checks import pairs as checks
from .._checks.texts import error
from ..batch_hard import batch_hard_mine
from ..reference.distances import rowwise
from .results import LabelledPairs

Array = TypeVar("Array", Tensor, np.ndarray)

MOST_PAIRS = 10_000_000  # that all_pairs lists, of 4472 rows: 160 MB
CHUNK_BYTES = 2**22  # of each side of the pairs whose distances are computed at a time


def pair_distances(embeddings: Array, pairs: Tensor | np.ndarray, *, distance: str = "sqeuclidean") -> Array:
    """The distance of each pair of rows, by direct differences.

    Source: direct differences `||a - b||`, which do not cancel as `|a|^2 - 2 a.b + |b|^2` does; the cosine
    distance `1 - cos` is half of the squared one of the rows scaled to length 1.

    Args:
        embeddings: [N, D], D >= 1; a tensor or NumPy array (also one mapped from a file, of which only the
            rows in pairs are read), float32, float64, bfloat16 or float16.
        pairs: [P, 2] indices of rows, from 0; integers. Pairs as the LFW evaluations of FaceNet and ArcFace
            lay them out, rows 0 and 1, 2 and 3, ..., are `numpy.arange(N).reshape(-1, 2)`.
        distance: "sqeuclidean", "euclidean" or "cosine" (a zero row is at distance 1 from all).

    Returns:
        [P], float32 or, of float64 embeddings, float64; a tensor on their device, or an array.
        Half inputs are computed in float32. No gradient. Memory beyond the result is some 20 MB.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance, a wrong shape, an index that is no row, or a distance that is not
            finite: a NaN or inf in one of its rows, or squares that overflow.
    """
    function = "pair_distances"
    _checks.choice(function, "distance", distance, _checks.DISTANCES)
    checks.embeddings(function, embeddings)
    indices = checks.pairs_array(function, pairs, embeddings.shape[0])
    dtype = torch.float64 if embeddings.dtype in (torch.float64, np.float64) else torch.float32
    step = max(1, CHUNK_BYTES // (embeddings.shape[1] * dtype.itemsize))
    parts = []
    for start in range(0, len(indices), step):
        chunk = indices[start : start + step]
        a, b = (_rows(embeddings, chunk[:, side]).to(dtype) for side in range(2))
        part = rowwise(a, b, distance)
        finite = part.isfinite()
        if not finite.all():
            i, j = chunk[int(finite.int().argmin())]
            expected = "finite, and so their squared distances"
            got = f"{part[~finite][0].item()} between rows {i} and {j}"
            raise error(ValueError, function, "embeddings", expected, got)
        parts.append(part)
    if isinstance(embeddings, Tensor):
        return torch.cat(parts) if parts else embeddings.new_empty(0, dtype=dtype)
    return torch.cat(parts).numpy() if parts else torch.empty(0, dtype=dtype).numpy()


def all_pairs(labels: Tensor | np.ndarray) -> LabelledPairs:
    """All N (N - 1) / 2 pairs of rows, by the larger row and then by the smaller.

    Args:
        labels: [N], integers.

    Raises:
        TypeError: labels of another type or dtype.
        ValueError: another shape, or more than 10,000,000 pairs (N > 4472).
    """
    y = checks.labels_array("all_pairs", labels)
    n = len(y)
    count = n * (n - 1) // 2
    if count > MOST_PAIRS:
        expected = f"of at most {MOST_PAIRS} pairs (balanced_pairs draws some)"
        raise error(ValueError, "all_pairs", "labels", expected, f"{n} labels, {count} pairs")
    rows = np.arange(n)
    pairs = _numbered(np.arange(count), rows, counts=rows, first=np.zeros_like(rows))
    return LabelledPairs(pairs, y[pairs[:, 0]] == y[pairs[:, 1]])


def balanced_pairs(labels: Tensor | np.ndarray, count: int, *, seed: int = 0) -> LabelledPairs:
    """`count` same and `count` different pairs, drawn uniformly, each at most once.

    They take turns, a same pair first, and are otherwise in random order, so that folds are balanced. Memory
    is O(N + count): pairs have numbers, and only the pairs of the drawn numbers are made.

    Args:
        labels: [N], integers.
        count: of each kind, >= 1.
        seed: >= 0; the same pairs for the same seed (and version of NumPy).

    Returns:
        `LabelledPairs` of 2 count pairs, the smaller row first.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: a wrong shape, or more pairs than there are.
    """
    function = "balanced_pairs"
    y = checks.labels_array(function, labels)
    seed = checks.seed(function, seed)
    order = np.argsort(y, kind="stable")
    start = np.searchsorted(y[order], y[order])  # of a row's class, in this order
    before = np.arange(len(y)) - start  # rows of its class before it
    same, different = int(before.sum()), int(start.sum())
    count = checks.pair_count(function, count, same, different)
    generator = np.random.default_rng(seed)
    return _in_turns(
        _numbered(generator.choice(same, count, replace=False), order, counts=before, first=start),
        _numbered(
            generator.choice(different, count, replace=False), order, counts=start, first=np.zeros_like(start)
        ),
    )


def hardest_pairs(
    embeddings: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    count: int | None = None,
    *,
    distance: str = "sqeuclidean",
) -> LabelledPairs:
    """Of each row the farthest row of its label and the nearest of another: the pairs most easily mistaken.

    Same and different pairs take turns, each hardest first. They are those of `batch_hard_mine`, each once,
    found without a matrix of all distances.

    Args:
        embeddings: [N, D], D >= 1, finite; a tensor or NumPy array, float32, float64, bfloat16 or float16.
        labels: [N], integers.
        count: how many of each kind, >= 1. None: as many as there are of both.
        distance: "sqeuclidean", "euclidean" or "cosine".

    Returns:
        `LabelledPairs` of 2 count pairs, the smaller row first.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance, shapes that do not go together, a NaN or inf, or a count
            of more pairs than there are.
    """
    function = "hardest_pairs"
    _checks.choice(function, "distance", distance, _checks.DISTANCES)
    checks.embeddings(function, embeddings)
    y = checks.labels_array(function, labels, embeddings.shape[0])
    x = embeddings if isinstance(embeddings, Tensor) else torch.from_numpy(np.array(embeddings))
    if not x.isfinite().all():
        raise error(ValueError, function, "embeddings", "finite", "NaN or inf among them")
    mined = batch_hard_mine(x, torch.from_numpy(y).to(x.device), distance=distance)
    anchors, positives, negatives = (rows.cpu().numpy() for rows in mined)
    kinds = []
    for others, sign in ((positives, -1), (negatives, 1)):
        pairs = np.unique(np.sort(np.stack([anchors, others], axis=1), axis=1), axis=0)
        far = pair_distances(x, pairs, distance=distance).cpu().numpy()
        kinds.append(pairs[np.argsort(sign * far, kind="stable")])
    there = tuple(map(len, kinds))
    count = min(there) if count is None else checks.pair_count(function, count, *there)
    return _in_turns(*(pairs[:count] for pairs in kinds))


def _rows(embeddings: Tensor | np.ndarray, indices: np.ndarray) -> Tensor:
    if isinstance(embeddings, Tensor):
        return embeddings.detach()[torch.from_numpy(indices).to(embeddings.device)]
    return torch.from_numpy(np.asarray(embeddings[indices]))


def _numbered(numbers: np.ndarray, order: np.ndarray, *, counts: np.ndarray, first: np.ndarray) -> np.ndarray:
    """int64 [P, 2], the pairs of these numbers, the smaller row first.

    Place i of `order` is paired with `counts[i]` places from `first[i]` on; numbers go place by place.
    """
    ends = counts.cumsum()
    place = np.searchsorted(ends, numbers, side="right")
    other = first[place] + numbers - (ends[place] - counts[place])
    return np.sort(np.stack([order[place], order[other]], axis=1), axis=1)


def _in_turns(same: np.ndarray, different: np.ndarray) -> LabelledPairs:
    pairs = np.stack([same, different], axis=1).reshape(-1, 2)
    return LabelledPairs(pairs, np.arange(len(pairs)) % 2 == 0)
