"""How well a gallery identifies: CMC for known probes, TPIR at FPIR for known and unknown ones.

A probe is a query whose identity is known. It is mated if that identity is enrolled. The threshold of the
gallery plays no part here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import recognition as checks
from .._checks.options import positive_integer
from .._checks.texts import describe, error
from .gallery import Gallery


class OpenSetRates(NamedTuple):
    """One value per FPIR that was asked for; float64 [F]. FNIR, the rate of misses, is 1 - tpir."""

    tpir: Tensor  # share of mated probes that are identified
    fpir: Tensor  # share of non-mated probes that are taken for somebody: at most what was asked for
    thresholds: Tensor  # distances have to be less; inf where nobody need be turned away


def cmc(gallery: Gallery, probes: Tensor, identities: Sequence[str], k: int) -> Tensor:
    """Cumulative match characteristic: the share of probes whose identity is among the r nearest, r = 1 to k.

    Source: Phillips, Grother, Micheals, "Evaluation Methods in Face Recognition" (2011): closed-set
    identification.

    Args:
        gallery: a `Gallery`.
        probes: [P, D] with P >= 1, as queries of `Gallery.identify`.
        identities: P names, all of them enrolled.
        k: the last rank, an integer >= 1.

    Returns:
        float64 [k], ascending.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: an identity that is not enrolled, or values that `Gallery.identify` does not take.
    """
    _check_gallery("cmc", gallery)
    k = positive_integer("cmc", "k", k)
    numbers = _numbers("cmc", gallery, probes, identities)
    if not len(numbers):
        raise error(ValueError, "cmc", "identities", "at least one", "none")
    if (numbers < 0).any():
        unknown = identities[int((numbers < 0).nonzero()[0])]
        raise error(ValueError, "cmc", "identities", "in the gallery", describe(unknown))
    found = gallery.search(probes, k)
    return (found.indices == numbers[:, None]).double().cumsum(dim=1).mean(dim=0)


def tpir_at_fpir(
    gallery: Gallery,
    probes: Tensor,
    identities: Sequence[str | None],
    fpir: Sequence[float],
    *,
    rank: int = 1,
) -> OpenSetRates:
    """Open-set identification: mated probes identified, against others taken for somebody.

    At threshold t, with distances d:

        FPIR(t)  share of non-mated probes whose nearest identity is at d < t
        TPIR(t)  share of mated probes whose own identity is among the `rank` nearest and at d < t

    t is the largest one with FPIR(t) <= `fpir`; with n non-mated probes and a target below 1 / n that is the
    distance of the nearest of them, where FPIR is 0. Sources: ISO/IEC 19795-1:2021 for the names; Phillips,
    Grother, Micheals, "Evaluation Methods in Face Recognition" (2011), where TPIR is the detection and
    identification rate, and FPIR the false alarm rate.

    Args:
        gallery: a `Gallery`.
        probes: [P, D], as queries of `Gallery.identify`.
        identities: P names; None, or a name that is not enrolled, for non-mated probes. At least one of each.
        fpir: a list or tuple of numbers from 0 to 1.
        rank: an integer >= 1.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: no mated or no non-mated probe, a rate that is none, or values that `Gallery.identify`
            does not take.
    """
    function = "tpir_at_fpir"
    _check_gallery(function, gallery)
    targets = checks.rates(function, "fpir", fpir)
    rank = positive_integer(function, "rank", rank)
    numbers = _numbers(function, gallery, probes, identities)
    mated = numbers >= 0
    for is_there, kind in ((mated, "mated"), (~mated, "non-mated")):
        if not is_there.any():
            raise error(ValueError, function, "identities", f"of at least one {kind} probe", "none")
    distances, indices = gallery.search(probes, rank)
    own = torch.where(indices == numbers[:, None], distances, torch.inf)[mated].amin(dim=1)
    strangers = distances[~mated, 0].sort().values
    n = len(strangers)
    # The (m + 1)-th distance as threshold lets at most m of them in; m / n is what a rate means in floats.
    allowed = [max(m for m in _around(target * n, n) if m / n <= target) for target in targets]
    ends = torch.cat([strangers, strangers.new_tensor([torch.inf])])
    thresholds = ends[torch.tensor(allowed, dtype=torch.int64)]
    return OpenSetRates(
        tpir=(own[None] < thresholds[:, None]).double().mean(dim=1),
        fpir=(strangers[None] < thresholds[:, None]).double().mean(dim=1),
        thresholds=thresholds.double(),
    )


def _around(count: float, n: int) -> range:
    """Whole numbers from 0 to n, one of which is `count` rounded down if it had no rounding error."""
    return range(max(int(count) - 1, 0), min(int(count) + 1, n) + 1)


def _check_gallery(function: str, gallery: Gallery) -> None:
    if not isinstance(gallery, Gallery):
        raise error(TypeError, function, "gallery", "a Gallery", describe(gallery))


def _numbers(function: str, gallery: Gallery, probes: Tensor, identities: Sequence[str | None]) -> Tensor:
    """int64 [P]: each probe's identity as an index into the gallery's, or -1."""
    checks.probe_identities(function, probes, identities)
    numbers = {identity: i for i, identity in enumerate(gallery.identities)}
    return torch.tensor([numbers.get(identity, -1) for identity in identities], dtype=torch.int64)
