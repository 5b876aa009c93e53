"""CMC and open-set rates against their definitions, probe by probe."""

from __future__ import annotations

import math

import pytest
import torch

from deepsim_ext.recognition import Gallery, cmc, tpir_at_fpir
from deepsim_ext.reference.distances import pairwise

from .samples import DISTANCES


def setting(distance="euclidean", people=12, templates=30, probes=80, strangers=40):
    """A gallery, probes, and who they are: the last `strangers` are not in the gallery."""
    centers = torch.randn(people + 8, 5, dtype=torch.float64)
    who = torch.cat([torch.arange(people), torch.randint(people, (templates - people,))])
    gallery = Gallery(5, distance=distance, dtype=torch.float64)
    gallery.enroll([f"p{i}" for i in who], centers[who] + torch.randn(templates, 5) * 0.5)
    probed = torch.cat([torch.randint(people, (probes,)), people + torch.randint(8, (strangers,))])
    queries = centers[probed] + torch.randn(probes + strangers, 5) * 0.5
    return gallery, queries, [f"p{i}" for i in probed]


def by_identity(gallery, queries):
    """[Q, identities] distances to the nearest template."""
    each = [pairwise(queries, gallery.templates(name), gallery.distance) for name in gallery.identities]
    return torch.stack([d.amin(dim=1) for d in each], dim=1)


@pytest.mark.parametrize("distance", DISTANCES)
def test_cmc_counts_ranks(distance):
    gallery, queries, names = setting(distance, strangers=0)
    distances = by_identity(gallery, queries)
    ranks = []
    for row, name in zip(distances, names, strict=True):
        own = row[gallery.identities.index(name)]
        ranks.append(1 + int((row < own).sum()))
    curve = cmc(gallery, queries, names, 14)
    exact = [sum(rank <= r for rank in ranks) / len(ranks) for r in range(1, 15)]
    assert curve.tolist() == pytest.approx(exact, abs=1e-12)
    assert 0 < curve[0] < curve[3] < 1 and curve[11:].tolist() == [1, 1, 1]
    gallery.threshold = 0.0  # plays no part
    assert torch.equal(cmc(gallery, queries, names, 14), curve)


def test_cmc_by_hand():
    gallery = Gallery(1)
    gallery.enroll(["a", "b", "c"], torch.tensor([[0.0], [10], [20]]))
    probes = torch.tensor([[1.0], [1.0], [1.0], [14.0]])
    assert cmc(gallery, probes, ["a", "b", "c", "c"], 4).tolist() == [0.25, 0.75, 1, 1]
    assert cmc(gallery, torch.tensor([19.0]), ["c"], 1).tolist() == [1]


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("distance", DISTANCES)
def test_rates_are_those_of_the_largest_threshold_that_is_allowed(distance, rank):
    gallery, queries, names = setting(distance)
    distances, targets = by_identity(gallery, queries), [0, 0.01, 0.025, 0.1, 0.29, 0.5, 0.999, 1]
    mated = torch.tensor([name in gallery for name in names])
    nearest = distances.amin(dim=1)
    own, ranks = torch.full((len(names),), math.inf, dtype=torch.float64), torch.zeros(len(names))
    for i, name in enumerate(names):
        if mated[i]:
            own[i] = distances[i, gallery.identities.index(name)]
            ranks[i] = 1 + (distances[i] < own[i]).sum()
    rates = tpir_at_fpir(gallery, queries, names, targets, rank=rank)

    def fpir(threshold):
        return float((nearest[~mated] < threshold).double().mean())

    candidates = [*nearest[~mated].tolist(), math.inf]
    for i, target in enumerate(targets):
        threshold = max(t for t in candidates if fpir(t) <= target)
        assert rates.thresholds[i] == pytest.approx(threshold, rel=1e-12)
        assert rates.fpir[i] == fpir(threshold) <= target
        hits = (own[mated] < threshold) & (ranks[mated] <= rank)
        assert rates.tpir[i] == pytest.approx(float(hits.double().mean()), abs=1e-12)
    assert 0 < rates.tpir[1] < rates.tpir[4]


def test_rates_by_hand():
    gallery = Gallery(1, threshold=0.5)  # which plays no part
    gallery.enroll(["a", "b"], torch.tensor([[0.0], [10]]))
    probes = torch.tensor([[1.0], [13], [4], [2], [-3], [12]])
    names = ["a", "b", "b", "stranger", None, None]
    rates = tpir_at_fpir(gallery, probes, names, (0, 0.33, 1 / 3, 0.67, 1, 0.67))
    assert rates.thresholds.tolist() == [2, 2, 2, 3, math.inf, 3]  # two strangers at 2: both or none
    assert rates.fpir.tolist() == pytest.approx([0, 0, 0, 2 / 3, 1, 2 / 3])
    assert rates.tpir.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 1 / 3])
    assert tpir_at_fpir(gallery, probes, names, [1.0], rank=2).tpir.tolist() == [1]


def test_every_whole_number_of_false_alarms_is_allowed_at_its_own_rate():
    """29 / 100 is what 0.29 means, though 0.29 * 100 is less than 29."""
    for n in (7, 100, 1000):
        gallery = Gallery(1, dtype=torch.float64)
        gallery.enroll("a", torch.zeros(1))
        probes = torch.arange(n + 1, dtype=torch.float64)[:, None]
        targets = [m / n for m in range(n + 1)]
        rates = tpir_at_fpir(gallery, probes, ["a"] + [None] * n, targets)
        assert rates.fpir.tolist() == targets


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda g, q: cmc("g", q, ["a"], 1), TypeError, 'cmc: gallery must be a Gallery, got "g"'),
        (lambda g, q: cmc(g, q, ["a"], 0), ValueError, "cmc: k must be an integer >= 1, got int 0"),
        (
            lambda g, q: cmc(g, q, ["a", "a"], 1),
            ValueError,
            "identities must be one per probe (1), got 2",
        ),
        (lambda g, q: cmc(g, q, ["x"], 1), ValueError, 'cmc: identities must be in the gallery, got "x"'),
        (lambda g, q: cmc(g, q, [None], 1), ValueError, "cmc: identities must be in the gallery, got None"),
        (lambda g, q: cmc(g, q[:0], [], 1), ValueError, "cmc: identities must be at least one, got none"),
        (
            lambda g, q: cmc(g, q, "a", 1),
            TypeError,
            'cmc: identities must be a list or tuple of names or None, got "a"',
        ),
        (
            lambda g, q: cmc(g, q, [3], 1),
            TypeError,
            "cmc: identities must be a list or tuple of names or None, got int 3 among them",
        ),
        (
            lambda g, q: cmc(g, q * math.nan, ["a"], 1),
            ValueError,
            "than 1e+18, got a NaN or inf",
        ),
        (
            lambda g, q: tpir_at_fpir(g, q, ["a"], [0.1]),
            ValueError,
            "tpir_at_fpir: identities must be of at least one non-mated probe, got none",
        ),
        (
            lambda g, q: tpir_at_fpir(g, q, [None], [0.1]),
            ValueError,
            "tpir_at_fpir: identities must be of at least one mated probe, got none",
        ),
        (
            lambda g, q: tpir_at_fpir(g, q, ["a"], 0.1),
            TypeError,
            "tpir_at_fpir: fpir must be a list or tuple of numbers from 0 to 1, got float 0.1",
        ),
        (lambda g, q: tpir_at_fpir(g, q, ["a"], [0.1, 1.5]), ValueError, "got float 1.5 among them"),
        (lambda g, q: tpir_at_fpir(g, q, ["a"], [math.nan]), ValueError, "got float nan among them"),
        (lambda g, q: tpir_at_fpir(g, q, ["a"], [True]), TypeError, "got bool True among them"),
        (
            lambda g, q: tpir_at_fpir(g, q, ["a"], [1], rank=0),
            ValueError,
            "an integer >= 1, got int 0",
        ),
    ],
)
def test_errors(call, kind, text):
    gallery = Gallery(2)
    gallery.enroll("a", torch.zeros(2))
    with pytest.raises(kind) as raised:
        call(gallery, torch.zeros(1, 2))
    assert str(raised.value).endswith(text)
