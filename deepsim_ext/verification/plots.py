"""Pictures of an evaluation, as the bytes of PNG files: ROC curve and histogram of distances."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from .extras import required
from .results import BestThreshold, EqualErrorRate, RocCurve, TrueAcceptRates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
BINS = 80


def roc_png(curve: RocCurve, equal: EqualErrorRate, rates: TrueAcceptRates, different: int) -> bytes:
    """True over false accept rate, the latter on a logarithmic axis down to half a pair of `different`.

    Between its points the curve is drawn as steps: what no threshold reaches is not promised.
    """
    figure, axes = _figure()
    left = 0.5 / different  # where 0 is drawn
    axes.plot(np.maximum(curve.far, left), curve.tar, drawstyle="steps-post", color="tab:blue", linewidth=2)
    axes.plot(
        [max(equal.rate, left)],
        [1 - equal.rate],
        "o",
        color="tab:orange",
        clip_on=False,
        zorder=3,
        label=f"equal error rate {equal.rate:.4f}",
    )
    for far, tar in dict.fromkeys(zip(rates.far.tolist(), rates.tar.tolist(), strict=True)):
        axes.plot(
            [max(far, left)],
            [tar],
            "s",
            color="tab:blue",
            clip_on=False,
            zorder=3,
            label=f"TAR {tar:.4f} at FAR {far:.2g}",
        )
    chance = np.geomspace(left, 1, 200)
    axes.plot(chance, chance, color="0.6", linestyle=":", linewidth=1, label="chance")
    axes.set(
        xscale="log",
        xlim=(left, 1),
        ylim=(0, 1.02),
        xlabel="false accept rate (FAR): different pairs accepted; left edge: none",
        ylabel="true accept rate (TAR): same pairs accepted",
        title="ROC curve",
    )
    axes.legend(loc="best")
    return _png(figure)


def histogram_png(distances: np.ndarray, same: np.ndarray, best: BestThreshold, distance: str) -> bytes:
    """Distances of same and of different pairs, as parts of each kind, and the threshold."""
    figure, axes = _figure()
    edges = np.histogram_bin_edges(distances, BINS)
    for kind, name, color in ((same, "same", "tab:blue"), (~same, "different", "tab:orange")):
        count = np.count_nonzero(kind)
        axes.hist(
            distances[kind],
            edges,
            weights=np.full(count, 1 / count),
            color=color,
            alpha=0.55,
            label=f"{count} {name} pairs",
        )
    axes.axvline(
        best.threshold,
        color="0.2",
        linestyle="--",
        label=f"threshold {best.threshold:.4g}, accuracy {best.accuracy:.4f}",
    )
    axes.set(
        xlabel=f"distance ({distance})",
        ylabel="part of the pairs of a kind",
        title="Distances of same and different pairs",
        ylim=(0, 1.3 * axes.get_ylim()[1]),  # room for the legend
    )
    axes.legend(loc="upper center", ncols=3, fontsize="small")
    return _png(figure)


def _figure() -> tuple[Figure, object]:
    figure = required("verify", "matplotlib.figure").Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
