"""The protocol of Labeled Faces in the Wild: what is chosen on nine folds is tested on the tenth."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .._checks import verification as checks
from .._checks.texts import error
from .decisions import accepted_counts
from .extras import required
from .results import KFoldAccuracy, ValidationRate

CONFIDENCE = 0.95


def kfold_accuracy(
    distances: Tensor | np.ndarray,
    same: Tensor | np.ndarray,
    *,
    folds: int = 10,
    thresholds: Tensor | np.ndarray | list[float] | None = None,
) -> KFoldAccuracy:
    """Accuracy of verification by the LFW protocol.

    The pairs are cut in their order into folds of equal size (the first `P mod folds` have one more). On each
    fold, pairs with `d < t` are called the same, where t is the lowest of the thresholds with the highest
    accuracy on all other folds.

    Source: Huang, Ramesh, Berg, Learned-Miller, "Labeled Faces in the Wild" (2007), section 3, View 2, with
    the thresholds of the evaluations of FaceNet and ArcFace.

    Args:
        distances: [P], finite; a tensor or NumPy array, float32, float64, bfloat16 or float16. The protocol's
            are squared Euclidean distances of unit vectors.
        same: [P], True or 1 where the pair belongs together; bool, integer or float. Every fold should have
            pairs of both kinds, as LFW's have.
        folds: from 2 to P.
        thresholds: [T], ascending. None: 0 to 4 in steps of 0.01, for squared distances of unit vectors.

    Returns:
        `KFoldAccuracy`: mean, standard deviation (of the population) over the F folds, and `interval`,
        `mean ± t s / sqrt(F)` as far as that lies in [0, 1], with s the standard deviation of the sample
        (division by F - 1) and t the 97.5 % quantile of Student's distribution of F - 1 degrees of freedom.
        The folds share most of what their thresholds are chosen on, so it is approximate. Also accuracy and
        threshold of every fold.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: shapes that do not go together, a NaN or inf, folds out of range, thresholds that do not
            ascend.
        ImportError: scikit-learn, of the extra `eval`, is not installed.
    """
    function = "kfold_accuracy"
    pairs = checks.scored_pairs(function, distances, same)
    folds = checks.fold_count(function, folds, len(pairs.same))
    grid = _grid(function, thresholds, 0.01)
    fold = _fold_of_pairs(len(pairs.same), folds)
    size = np.bincount(fold)
    accepted_different, accepted_same = accepted_counts(pairs, grid, fold, folds)
    correct = accepted_same + (np.bincount(fold, ~pairs.same).astype(int)[:, None] - accepted_different)
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)
    accuracies = correct[np.arange(folds), best] / size
    return KFoldAccuracy(
        float(accuracies.mean()),
        float(accuracies.std()),
        _interval(function, accuracies),
        accuracies,
        grid[best],
    )


def val_at_far(
    distances: Tensor | np.ndarray,
    same: Tensor | np.ndarray,
    *,
    far: float = 1e-3,
    folds: int = 10,
    thresholds: Tensor | np.ndarray | list[float] | None = None,
) -> ValidationRate:
    """Validation rate (true accept rate) at a false accept rate, by the LFW protocol.

    Folds as in `kfold_accuracy`. The threshold of a fold is where the false accept rate on all other folds
    reaches `far`, between two of the thresholds by linear interpolation. Of several thresholds with exactly
    that rate it is the highest. It is 0 if none of them reaches `far`, and the lowest if all exceed it.

    Source: Schroff, Kalenichenko, Philbin, "FaceNet" (2015), section 4, by folds as the evaluations of
    FaceNet and ArcFace do it.

    Args:
        distances: [P], finite; a tensor or NumPy array, float32, float64, bfloat16 or float16.
        same: [P], True or 1 where the pair belongs together; bool, integer or float. Every fold must have
            pairs of both kinds.
        far: from 0 to 1.
        folds: from 2 to P.
        thresholds: [T], ascending. None: 0 to 4 in steps of 0.001, for squared distances of unit vectors.

    Returns:
        `ValidationRate`: mean, standard deviation and 95 % confidence interval over the folds as in
        `kfold_accuracy`, the false accept rate reached, and rates and threshold of every fold.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: shapes that do not go together, a NaN or inf, folds or far out of range, thresholds that
            do not ascend, a fold without same or without different pairs.
        ImportError: scikit-learn, of the extra `eval`, is not installed.
    """
    function = "val_at_far"
    pairs = checks.scored_pairs(function, distances, same)
    target = checks.number(function, "far", far, 0, 1)
    folds = checks.fold_count(function, folds, len(pairs.same))
    grid = _grid(function, thresholds, 0.001)
    fold = _fold_of_pairs(len(pairs.same), folds)
    sizes = np.stack([np.bincount(fold, ~pairs.same), np.bincount(fold, pairs.same)])  # [2, F]
    if not sizes.all():
        kind, number = np.argwhere(sizes == 0)[0]
        expected = f"of both kinds in each of the {folds} folds, cut in the order of the pairs"
        got = f"no {('different', 'same')[kind]} pair in fold {number + 1}"
        raise error(ValueError, function, "same", expected, got)
    false_accepts = accepted_counts(pairs, grid, fold, folds)[0]
    others = (false_accepts.sum(axis=0) - false_accepts) / (sizes[0].sum() - sizes[0])[:, None]
    # A curve with flat parts: np.interp takes them, as scipy's splines do not.
    chosen = np.array([np.interp(target, curve, grid) if curve[-1] >= target else 0.0 for curve in others])
    accepted = pairs.distances < chosen[fold]
    fars = np.bincount(fold, accepted & ~pairs.same) / sizes[0]
    rates = np.bincount(fold, accepted & pairs.same) / sizes[1]
    return ValidationRate(
        float(rates.mean()),
        float(rates.std()),
        float(fars.mean()),
        _interval(function, rates),
        rates,
        fars,
        chosen,
    )


def _grid(function: str, thresholds: Tensor | np.ndarray | list[float] | None, step: float) -> np.ndarray:
    return np.arange(0, 4, step) if thresholds is None else checks.thresholds_array(function, thresholds)


def _fold_of_pairs(pairs: int, folds: int) -> np.ndarray:
    """int64 [P]: the fold of each, as scikit-learn's KFold cuts without shuffling."""
    size, larger = divmod(pairs, folds)
    return np.repeat(np.arange(folds), size + (np.arange(folds) < larger))


def _interval(function: str, values: np.ndarray) -> tuple[float, float]:
    """The confidence interval that `kfold_accuracy` describes."""
    special = required(function, "scipy.special")
    n, mean = len(values), values.mean()
    half = special.stdtrit(n - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1) / np.sqrt(n)
    return max(0.0, float(mean - half)), min(1.0, float(mean + half))
