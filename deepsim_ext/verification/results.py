"""What the evaluations return: floats and NumPy arrays. F folds, R rates, K points of a curve."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class BestThreshold(NamedTuple):
    """The threshold that decides most pairs rightly."""

    threshold: float
    accuracy: float  # with that threshold, on the pairs it was chosen from


class KFoldAccuracy(NamedTuple):
    """Accuracy on folds, each with the threshold that is best on the other folds."""

    mean: float
    std: float  # over the folds, of the population (division by F)
    interval: tuple[float, float]  # 95 % confidence interval of the mean, by Student's t
    accuracies: np.ndarray  # float64 [F]
    thresholds: np.ndarray  # float64 [F]


class ValidationRate(NamedTuple):
    """Validation rate on folds, each with the threshold whose false accept rate on the others is as asked."""

    mean: float
    std: float  # over the folds, of the population (division by F)
    far: float  # mean false accept rate that the thresholds have on their folds
    interval: tuple[float, float]  # 95 % confidence interval of the mean, by Student's t
    rates: np.ndarray  # float64 [F]: of the same pairs of a fold, the part accepted
    fars: np.ndarray  # float64 [F]: of the different pairs of a fold, the part accepted
    thresholds: np.ndarray  # float64 [F]


class RocCurve(NamedTuple):
    """The receiver operating characteristic, from no pair accepted to all of them."""

    far: np.ndarray  # float64 [K], ascending from 0 to 1: of the different pairs, the part accepted
    tar: np.ndarray  # float64 [K], ascending from 0 to 1: of the same pairs, the part accepted
    thresholds: np.ndarray  # float64 [K], ascending: accepted are distances < threshold


class EqualErrorRate(NamedTuple):
    """Where as many different pairs are accepted as same pairs are rejected, in parts of each."""

    rate: float
    threshold: float


class TrueAcceptRates(NamedTuple):
    """Points of the curve with the most accepted same pairs that keep to given false accept rates."""

    tar: np.ndarray  # float64 [R]
    far: np.ndarray  # float64 [R]: what is reached, at most what was asked
    thresholds: np.ndarray  # float64 [R]: accepted are distances < threshold


class LabelledPairs(NamedTuple):
    """Pairs of rows, and which of them belong together."""

    pairs: np.ndarray  # int64 [P, 2]
    same: np.ndarray  # bool [P]


class LfwPairs(NamedTuple):
    """A pairs file of LFW: the images it names, each once, and pairs of them."""

    images: list[tuple[str, int]]  # name and number, in order of appearance
    pairs: np.ndarray  # int64 [P, 2]: indices into images
    same: np.ndarray  # bool [P]
    folds: int  # 1 for the development files, which have none
