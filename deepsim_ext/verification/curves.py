"""The ROC curve of distances, and what is read off it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .._checks import verification as checks
from .extras import required
from .results import EqualErrorRate, RocCurve, TrueAcceptRates


def roc(distances: Tensor | np.ndarray, same: Tensor | np.ndarray) -> RocCurve:
    """The ROC curve, by scikit-learn's `roc_curve`: a point for every distance that occurs, and (0, 0).

    Args:
        distances: [P], finite; a tensor or NumPy array, float32, float64, bfloat16 or float16.
        same: [P], True or 1 where the pair belongs together; bool, integer or float; both kinds must occur.

    Returns:
        `RocCurve`. `verify(distances, thresholds[i])` accepts the parts `far[i]` and `tar[i]`: a threshold is
        the next float64 above the largest distance that it accepts, the first is the smallest distance.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: shapes that do not go together, a NaN or inf, pairs of one kind only.
        ImportError: scikit-learn, of the extra `eval`, is not installed.
    """
    return _roc("roc", distances, same)


def eer(distances: Tensor | np.ndarray, same: Tensor | np.ndarray) -> EqualErrorRate:
    """The equal error rate: where the ROC curve, its points joined by lines, has FAR = 1 - TAR.

    Args:
        distances, same: as in `roc`.

    Returns:
        `EqualErrorRate`: the rate, and the threshold interpolated between those of the two points.

    Raises:
        TypeError, ValueError, ImportError: as `roc`.
    """
    curve = _roc("eer", distances, same)
    gap = curve.far - (1 - curve.tar)  # from -1 to 1, ascending
    right = int(np.argmax(gap >= 0))
    left = right - 1
    part = -gap[left] / (gap[right] - gap[left])
    rate, threshold = (
        float(values[left] + part * (values[right] - values[left]))
        for values in (curve.far, curve.thresholds)
    )
    return EqualErrorRate(rate, threshold)


def tar_at_far(
    distances: Tensor | np.ndarray,
    same: Tensor | np.ndarray,
    fars: Tensor | np.ndarray | list[float],
) -> TrueAcceptRates:
    """The largest true accept rate whose false accept rate is at most each of `fars`, on the ROC curve.

    Nothing is interpolated: every result is a threshold that does what is said. A rate below 1 / (number of
    different pairs) allows no false accept.

    Args:
        distances, same: as in `roc`.
        fars: [R], numbers from 0 to 1 in any order.

    Returns:
        `TrueAcceptRates`: arrays [R], also the false accept rates reached and the thresholds, of the largest
        distance that is accepted.

    Raises:
        TypeError, ValueError, ImportError: as `roc`; ValueError for rates outside 0 to 1.
    """
    targets = checks.rates_array("tar_at_far", "fars", fars)
    curve = _roc("tar_at_far", distances, same)
    points = np.searchsorted(curve.far, targets, side="right") - 1
    return TrueAcceptRates(curve.tar[points], curve.far[points], curve.thresholds[points])


def _roc(function: str, distances: Tensor | np.ndarray, same: Tensor | np.ndarray) -> RocCurve:
    pairs = checks.scored_pairs(function, distances, same)
    checks.both_kinds(function, pairs)
    metrics = required(function, "sklearn.metrics")
    # Points on a line between others are kept: tar_at_far may want one.
    far, tar, scores = metrics.roc_curve(pairs.same, -pairs.distances, drop_intermediate=False)
    thresholds = np.nextafter(-scores, np.inf)
    thresholds[0] = pairs.distances.min()
    return RocCurve(far, tar, thresholds)
