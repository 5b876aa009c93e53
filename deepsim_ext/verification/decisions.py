"""From a distance to a decision: the same iff it is less than a threshold."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .._checks import verification as checks
from .results import BestThreshold

Array = TypeVar("Array", Tensor, np.ndarray)


def verify(distances: Array, threshold: float) -> Array:
    """Which pairs are the same: `distance < threshold`.

    Args:
        distances: [P], finite; a tensor or NumPy array, float32, float64, bfloat16 or float16.
        threshold: finite, in units of the distances. It is compared in float64.

    Returns:
        bool [P]; a tensor on the device of the distances, or an array.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: a wrong shape, or a NaN or inf.
    """
    threshold = checks.number("verify", "threshold", threshold)
    decided = checks.distances_array("verify", distances) < threshold
    return torch.from_numpy(decided).to(distances.device) if isinstance(distances, Tensor) else decided


def best_threshold(
    distances: Tensor | np.ndarray,
    same: Tensor | np.ndarray,
    thresholds: Tensor | np.ndarray | list[float] | None = None,
) -> BestThreshold:
    """The threshold with the highest accuracy, `(true accepts + true rejects) / P`; the lowest of equals.

    Args:
        distances: [P], P >= 1, finite; a tensor or NumPy array, float32, float64, bfloat16 or float16.
        same: [P], True or 1 where the pair belongs together; bool, integer or float.
        thresholds: [T], ascending, to choose from. None: all that decide differently, each halfway between
            two neighbouring distances, one that accepts no pair (the smallest distance), and one that accepts
            all (the next float64 above the largest).

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: shapes that do not go together, a NaN or inf, thresholds that do not ascend.
    """
    pairs = checks.scored_pairs("best_threshold", distances, same)
    if thresholds is None:
        cuts = _cuts(pairs.distances)
    else:
        cuts = checks.thresholds_array("best_threshold", thresholds)
    different, accepted = accepted_counts(pairs, cuts, np.zeros(len(pairs.same), np.int64), 1)[:, 0]
    correct = accepted + (np.count_nonzero(~pairs.same) - different)
    best = int(np.argmax(correct))
    return BestThreshold(float(cuts[best]), float(correct[best] / len(pairs.same)))


def accepted_counts(
    pairs: checks.ScoredPairs, thresholds: np.ndarray, fold: np.ndarray, folds: int
) -> np.ndarray:
    """int64 [2, F, T]: how many different [0] and same [1] pairs of each fold each threshold accepts.

    By counting the pairs between neighbouring thresholds: O(P log T + F T), not O(P T).

    Args:
        thresholds: float64 [T], ascending.
        fold: int64 [P], the fold of each pair.
    """
    bins = len(thresholds) + 1
    first = np.searchsorted(thresholds, pairs.distances, side="right")  # the first threshold above it
    counts = np.bincount((pairs.same * folds + fold) * bins + first, minlength=2 * folds * bins)
    return counts.reshape(2, folds, bins)[:, :, :-1].cumsum(axis=2)


def _cuts(distances: np.ndarray) -> np.ndarray:
    d = np.unique(distances)
    halfway = d[:-1] / 2 + d[1:] / 2
    # Between neighbours in float64 there is nothing; the upper one accepts the lower one just as well.
    halfway = np.where(halfway > d[:-1], halfway, d[1:])
    return np.concatenate([d[:1], halfway, np.nextafter(d[-1:], np.inf)])
