"""Retrieval metrics against their definitions, query by query, and against pytorch-metric-learning; NMI."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from sklearn.cluster import KMeans

from benchmarks.memory import peak_in_subprocess
from deepsim_ext import _nearest_rows as nearest_rows_module
from deepsim_ext import evaluation
from deepsim_ext.evaluation import nmi, retrieval_metrics
from deepsim_ext.reference.distances import pairwise

from .samples import DISTANCES, DTYPES

MIB = 2**20
KEYS = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_reciprocal_rank")


def by_definition(x, labels, refs=None, ref_labels=None, *, recall_at=(1, 2, 4, 8), distance="euclidean"):
    """Label, rank of the first match, R-precision and AP@R of every query that has a match."""
    d = pairwise(x.double(), (x if refs is None else refs).double(), distance)
    others = (labels if ref_labels is None else ref_labels).tolist()
    rows = []
    for i, label in enumerate(labels.tolist()):
        order = [j for j in d[i].argsort(stable=True).tolist() if refs is not None or j != i]
        match = [others[j] == label for j in order]
        r = sum(match)
        if r:
            precisions = [sum(match[: i + 1]) / (i + 1) for i in range(r) if match[i]]
            rows.append((label, match.index(True) + 1, sum(match[:r]) / r, sum(precisions) / r))
    return rows


def summary(rows, recall_at=(1, 2, 4, 8), avg_of_avgs=False):
    """What the metrics are, from the rows of `by_definition`."""
    labels = [row[0] for row in rows]

    def mean(values):
        if avg_of_avgs:
            classes = [[v for v, y in zip(values, labels, strict=True) if y == c] for c in set(labels)]
            values = [sum(c) / len(c) for c in classes]
        return sum(values) / len(values)

    ranks = [row[1] for row in rows]
    return {
        "precision_at_1": mean([rank == 1 for rank in ranks]),
        "recall_at_k": {k: mean([rank <= k for rank in ranks]) for k in recall_at},
        "r_precision": mean([row[2] for row in rows]),
        "mean_average_precision_at_r": mean([row[3] for row in rows]),
        "mean_reciprocal_rank": mean([1 / rank for rank in ranks]),
    }


def check(got, exact, tolerance=1e-12):
    for key, value in exact.items():
        assert getattr(got, key) == pytest.approx(value, abs=tolerance), key


def clusters(n, classes, d=6, spread=1.0):
    """Rows of classes of uneven sizes, singletons among them."""
    labels = (torch.rand(n) ** 2 * classes).long()
    return torch.randn(classes, d, dtype=torch.float64)[labels] + spread * torch.randn(n, d), labels


# ---- against the definitions -------------------------------------------------------------------------------


@pytest.mark.parametrize("avg_of_avgs", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("n", "classes"), [(40, 25), (150, 6), (200, 2)])
def test_is_what_the_definitions_say(n, classes, distance, avg_of_avgs):
    x, labels = clusters(n, classes)
    rows = by_definition(x, labels, distance=distance)
    got = retrieval_metrics(x, labels, distance=distance, avg_of_avgs=avg_of_avgs, recall_at=[3, 1, 50])
    check(got, summary(rows, (3, 1, 50), avg_of_avgs))
    assert (got.queries, got.lone_queries) == (len(rows), n - len(rows))
    assert list(got.recall_at_k) == [3, 1, 50]
    assert (
        retrieval_metrics(x, labels, x, labels, distance=distance, avg_of_avgs=avg_of_avgs)[3:5] == got[3:5]
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_against_references(distance):
    x, labels = clusters(60, 9)
    refs, ref_labels = clusters(45, 7)
    rows = by_definition(x, labels, refs, ref_labels, distance=distance)
    got = retrieval_metrics(x, labels, refs, ref_labels, distance=distance)
    check(got, summary(rows))
    assert got.lone_queries == 60 - len(rows) > 0
    # The same rows as another tensor are references like any others: each query finds itself.
    assert retrieval_metrics(x, labels, x.clone(), labels).precision_at_1 == 1


@pytest.mark.parametrize("first_look", [1, 2, 128])
def test_first_matches_far_behind(first_look, monkeypatch):
    """With labels that say nothing; also where neighbours are looked at in several parts."""
    monkeypatch.setattr(evaluation, "FIRST_LOOK", first_look)
    for module in (evaluation, nearest_rows_module):
        monkeypatch.setattr(module, "WORKSPACE", 700)
    x, labels = torch.randn(190, 3, dtype=torch.float64), torch.randint(60, (190,))
    check(retrieval_metrics(x, labels), summary(by_definition(x, labels)))
    refs, ref_labels = torch.randn(150, 3, dtype=torch.float64), torch.randint(60, (150,))
    got = retrieval_metrics(x, labels, refs, ref_labels, distance="cosine")
    check(got, summary(by_definition(x, labels, refs, ref_labels, distance="cosine")))


@pytest.mark.parametrize("first_look", [1, 128])
def test_equal_distances_come_by_index(first_look, monkeypatch):
    monkeypatch.setattr(evaluation, "FIRST_LOOK", first_look)
    for _ in range(5):
        x, labels = torch.randint(3, (150, 2)).double() + 0.1, torch.randint(20, (150,))
        check(retrieval_metrics(x, labels), summary(by_definition(x, labels)))
    x[:] = 1
    check(retrieval_metrics(x.float(), labels), summary(by_definition(x, labels)))
    check(retrieval_metrics(x * 0, labels, distance="cosine"), summary(by_definition(x, labels)))


def rows_of_ties(kind, n, dtype):
    """Many of them equal, or nearly, but for "spread"; all distances that are asked for have no rounding."""
    steps = torch.randint(-2, 3, (n, 4)).double()
    return {
        "spread": torch.randn(n, 4, dtype=torch.float64),
        "grid": steps,
        "one point": torch.ones(n, 4),
        "signs": steps.sign() + (steps == 0),  # of length 2: their cosines are not rounded either
        "far from zero": 4096 + steps / 1024,  # where float32's products have no digit of their distances
        "farther": 2.0**40 + steps / 1024
        if dtype == torch.float64
        else 2.0**12 + steps / 2048,  # nor float64's
        "near": 1 + steps * torch.finfo(dtype).eps,
        "short": steps * 2.0**-100,
    }[kind].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "distance"),
    [
        *(("spread", distance) for distance in DISTANCES),
        *(("one point", distance) for distance in DISTANCES),
        *(("signs", distance) for distance in DISTANCES),
        *((kind, "euclidean") for kind in ("grid", "far from zero", "farther", "near", "short")),
    ],
)
def test_ranks_of_first_matches_far_behind(kind, distance, dtype, monkeypatch):
    """Beside ties, in several tiles, with a class of one row; among references, too."""
    monkeypatch.setattr(evaluation, "FIRST_LOOK", 1)
    monkeypatch.setattr(nearest_rows_module, "MAX_NEIGHBORS", 32)
    monkeypatch.setattr(nearest_rows_module, "TILE", 32 * 50)
    x, labels = rows_of_ties(kind, 170, dtype), torch.randint(60, (170,))
    labels[100] = -1
    refs, ref_labels = rows_of_ties(kind, 140, dtype), torch.randint(60, (140,))
    for others in ((), (refs, ref_labels), (x.clone(), labels.flip(0))):
        rows = by_definition(x, labels, *others, distance=distance)
        got = retrieval_metrics(x, labels, *others, distance=distance, recall_at=(1, 10, 99))
        check(got, summary(rows, (1, 10, 99)))
        assert got.queries == len(rows) and got.mean_reciprocal_rank < 0.5


@pytest.mark.parametrize("distance", DISTANCES)
def test_first_match_is_the_last_of_all(distance):
    """Behind the neighbours of a search, and all tiles of references but one row of the last."""
    n = 2 * nearest_rows_module.MAX_NEIGHBORS + 3
    far, labels = torch.linspace(1, 2, n).double(), torch.arange(n)
    labels[-1] = -1
    for angle in (far, far * 0 + 1):  # ever farther, and all at one distance
        refs = torch.stack([angle.cos(), angle.sin()], dim=1)
        for label, rank in ((-1, n), (n - 2, n - 1), (0, 1)):
            query = torch.tensor([[1.0, 0]]).double(), torch.tensor([label])
            got = retrieval_metrics(*query, refs, labels, distance=distance, recall_at=(rank - 1 or 1, rank))
            assert got.mean_reciprocal_rank == 1 / rank
            assert got.recall_at_k[rank] == 1 and (rank == 1 or got.recall_at_k[rank - 1] == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_pairs_are_measured_as_in_a_search(distance, dtype):
    """To the bit: what a search has found is compared with what it has not looked at."""
    x, refs = torch.randn(50, 37, dtype=dtype), torch.randn(90, 37, dtype=dtype)
    x[3] = refs[5] = 0
    rows, columns = torch.arange(50).repeat_interleave(90), torch.arange(90).repeat(50)
    pairs = nearest_rows_module.pairs_of_tile(x, refs, rows, columns, distance=distance).view(50, 90)
    found = nearest_rows_module.nearest_rows(x, refs, 90, distance=distance)
    assert torch.equal(pairs.gather(1, found.indices), found.distances)


def test_classes_larger_than_the_neighbours_of_one_search():
    """More than 1024 matches; against the cumulative form, for the definition takes minutes."""
    x, labels = torch.randn(2300, 2, dtype=torch.float64), (torch.rand(2300) < 0.4).long()
    d = pairwise(x, x, "euclidean").fill_diagonal_(math.inf)
    match = labels[d.argsort(dim=1)[:, :-1]] == labels[:, None]
    match_in_r = match & (torch.arange(2299) < match.sum(dim=1, keepdim=True))
    precision = match_in_r.cumsum(dim=1) / torch.arange(1, 2300).double()
    got = retrieval_metrics(x, labels)
    r = match.sum(dim=1)
    assert r.max() > 1024 and r.min() < 1024
    assert got.r_precision == pytest.approx(float((match_in_r.sum(dim=1) / r.double()).mean()), abs=1e-12)
    average = (precision * match_in_r).sum(dim=1) / r
    assert got.mean_average_precision_at_r == pytest.approx(float(average.mean()), abs=1e-12)


def test_labels_stay_int64():
    """In float64, 2**53 and 2**53 + 1 are one label; in float32, many more."""
    x = torch.tensor([[0.0], [1], [10], [11]])
    labels = torch.tensor([2**53, 2**53 + 1, 2**53, 2**53 + 1])
    assert retrieval_metrics(x, labels).precision_at_1 == 0
    assert nmi(x, labels) == pytest.approx(0, abs=1e-12)
    labels = torch.tensor([-(2**63), -(2**63), 2**63 - 1, 2**63 - 1])
    assert retrieval_metrics(x, labels).precision_at_1 == 1
    assert nmi(x, labels) == pytest.approx(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes(dtype):
    x, labels = clusters(120, 8)
    x = x.to(dtype).requires_grad_()
    check(retrieval_metrics(x, labels), summary(by_definition(x.detach(), labels)), 1e-6)
    assert 0 < nmi(x, labels) < 1


def test_nobody_has_a_match():
    for x, labels in ((torch.randn(4, 2), torch.arange(4)), (torch.empty(0, 2), torch.arange(0))):
        for refs in ((), (torch.randn(3, 2), torch.arange(3) + 10), (torch.empty(0, 2), torch.arange(0))):
            got = retrieval_metrics(x, labels, *refs, recall_at=(1,), avg_of_avgs=bool(refs))
            assert got.queries == 0 and got.lone_queries == len(x)
            assert all(math.isnan(value) for value in (*got[:1], *got[2:5], got.recall_at_k[1]))


def test_one_pair():
    got = retrieval_metrics(torch.zeros(2, 1), torch.tensor([5, 5]))
    assert got == (1, {1: 1, 2: 1, 4: 1, 8: 1}, 1, 1, 1, 2, 0)


# ---- against pytorch-metric-learning -----------------------------------------------------------------------


def pml(x, labels, refs=None, ref_labels=None, *, distance="euclidean", **options):
    """Its metrics with float64 neighbours, and without its casting them to float32."""

    def neighbours(query, k, reference, includes_query):
        d = pairwise(x, x if refs is None else refs, distance)
        if includes_query:
            d.fill_diagonal_(math.inf)
        found = d.sort(dim=1, stable=True)
        return found.values[:, :k], found.indices[:, :k]

    calculator = AccuracyCalculator(include=KEYS, knn_func=neighbours, device=torch.device("cpu"), **options)
    return calculator.get_accuracy(x, labels, refs, ref_labels)


def check_pml(got, theirs):
    check(got, {key: theirs[key] for key in KEYS if key != "mean_reciprocal_rank"})
    # which it computes in float32
    assert got.mean_reciprocal_rank == pytest.approx(theirs["mean_reciprocal_rank"], abs=1e-6)


@pytest.mark.parametrize("avg_of_avgs", [False, True])
@pytest.mark.parametrize(("n", "classes"), [(30, 20), (200, 12), (300, 2)])
def test_equals_pytorch_metric_learning(n, classes, avg_of_avgs):
    x, labels = clusters(n, classes)
    got = retrieval_metrics(x, labels, avg_of_avgs=avg_of_avgs)
    check_pml(got, pml(x, labels, avg_of_avgs=avg_of_avgs))
    refs, ref_labels = clusters(n // 2, classes + 3)
    got = retrieval_metrics(x, labels, refs, ref_labels, avg_of_avgs=avg_of_avgs, distance="cosine")
    check_pml(got, pml(x, labels, refs, ref_labels, avg_of_avgs=avg_of_avgs, distance="cosine"))


def test_equals_its_own_nearest_neighbours_too():
    x, labels = clusters(250, 10)
    theirs = AccuracyCalculator(include=KEYS, device=torch.device("cpu")).get_accuracy(x.float(), labels)
    check(
        retrieval_metrics(x.float(), labels), theirs, 1e-3
    )  # where it finds other neighbours by cancellation


@pytest.mark.parametrize(
    ("positions", "labels"),
    [
        ([0, 1, 10, 11, 20, 21], [0, 0, 1, 1, 2, 2]),  # all right
        ([0, 1, 10, 11, 20, 21], [0, 1, 1, 2, 2, 0]),  # all wrong at first
        ([0, 1, 10, 11, 20, 21], [0, 0, 1, 2, 1, 2]),  # half right
        ([0, 1, 2.1, 3.3, 4.6, 6], [0, 0, 0, 0, 0, 0]),  # one class
        ([0, 1, 2.1, 3.3, 4.6, 6], [0, 0, 0, 0, 0, 1]),  # and a lone query
        ([0, 1, 2.1, 3.3, 4.6, 6], [0, 1, 0, 1, 0, 1]),
    ],
)
def test_known_cases(positions, labels):
    x, labels = torch.tensor(positions, dtype=torch.float64)[:, None], torch.tensor(labels)
    check_pml(retrieval_metrics(x, labels), pml(x, labels))


def test_known_values():
    x = torch.arange(10.0)[:, None] ** 1.1
    assert retrieval_metrics(x, torch.arange(10) // 5 * 0)[2:5] == (1, 1, 1)
    got = retrieval_metrics(torch.tensor([[0.0], [1], [3], [7]]), torch.tensor([0, 1, 0, 1]))
    # First matches at ranks 2, 3, 2, 2; R = 1.
    assert got[:1] + got[2:] == (0, 0, 0, pytest.approx((3 / 2 + 1 / 3) / 4), 4, 0)
    assert got.recall_at_k == {1: 0, 2: 0.75, 4: 1, 8: 1}


@pytest.mark.parametrize("seed", [0, 3])
def test_nmi_is_that_of_pytorch_metric_learning_for_the_same_clusters(seed):
    x, labels = clusters(300, 9)
    x = x.float()

    def kmeans(query, number):
        return torch.from_numpy(KMeans(number, random_state=seed).fit_predict(query.numpy()))

    calculator = AccuracyCalculator(include=("NMI",), kmeans_func=kmeans, device=torch.device("cpu"))
    exact = calculator.get_accuracy(x, labels)["NMI"]
    assert nmi(x, labels, seed=seed) == pytest.approx(exact, abs=1e-12)
    assert 0.1 < exact < 0.9


# ---- memory and errors -------------------------------------------------------------------------------------


def evaluation_probe(n: str, classes: str, spread: str):
    """The call to measure, and the same on few rows to warm up."""

    def call(rows: int):
        labels = torch.arange(rows) % int(classes)
        x = torch.randn(int(classes), 16)[labels] + float(spread) * torch.randn(rows, 16)
        return lambda: retrieval_metrics(x, labels)

    return call(int(n)), call(200)


@pytest.mark.parametrize(("classes", "spread"), [(5000, 0.4), (100, 3.0)], ids=["small", "large"])
def test_needs_no_square_matrix(classes, spread):
    """Of 20,000 rows: 400 MB as bool, 1.6 GB as float32."""
    assert peak_in_subprocess("tests.test_evaluation:evaluation_probe", 20_000, classes, spread) < 128 * MIB


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        (
            {"labels": torch.zeros(3, 2).long()},
            ValueError,
            "labels must be int64 of shape [N]=[3], got int64 [3, 2]",
        ),
        ({"labels": torch.zeros(3)}, TypeError, "labels must be int64 of shape [N]=[3], got float32 [3]"),
        ({"labels": [0, 0, 1]}, TypeError, "labels must be int64 of shape [N]=[3], got list"),
        ({"embeddings": torch.zeros(3)}, ValueError, "of shape [N, D] with D >= 1, got float32 [3]"),
        (
            {"embeddings": torch.tensor([[0], [math.nan], [1]])},
            ValueError,
            "embeddings must be finite, with rows shorter than 1e+18, got a NaN or inf",
        ),
        (
            {"ref_embeddings": torch.full((2, 1), 1e30), "ref_labels": torch.zeros(2).long()},
            ValueError,
            "ref_embeddings must be finite, with rows shorter than 1e+18, got a longer one",
        ),
        ({"ref_labels": torch.zeros(2).long()}, ValueError, "given together with ref_labels, got None"),
        ({"recall_at": 5}, TypeError, "recall_at must be a list or tuple of integers >= 1, got int 5"),
        ({"recall_at": (1, 0)}, ValueError, "recall_at[1] must be an integer >= 1, got int 0"),
        ({"avg_of_avgs": 1}, TypeError, "avg_of_avgs must be True or False, got int 1"),
        (
            {"distance": "l2"},
            ValueError,
            'distance must be one of "euclidean", "sqeuclidean", "cosine", got "l2"',
        ),
    ],
)
def test_errors(changes, kind, text):
    arguments = {"embeddings": torch.zeros(3, 1), "labels": torch.zeros(3).long()} | changes
    with pytest.raises(kind) as raised:
        retrieval_metrics(**arguments)
    assert str(raised.value).startswith("retrieval_metrics: ") and str(raised.value).endswith(text)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ((torch.zeros(0, 2), torch.zeros(0).long()), ValueError, "embeddings must be of at least one row"),
        ((torch.zeros(2, 2), torch.zeros(3).long()), ValueError, "labels must be int64 of shape [N]=[2]"),
        ((torch.zeros(2, 2) / 0, torch.zeros(2).long()), ValueError, "embeddings must be finite, with rows"),
    ],
)
def test_errors_of_nmi(arguments, kind, text):
    with pytest.raises(kind) as raised:
        nmi(*arguments)
    assert str(raised.value).startswith(f"nmi: {text}")
    with pytest.raises(ValueError, match=r"^nmi: seed must be an integer from 0 to 4294967295, got int -1$"):
        nmi(torch.zeros(2, 2), torch.zeros(2).long(), seed=-1)


def test_nmi_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError) as raised:
        nmi(torch.zeros(2, 2), torch.zeros(2).long())
    assert str(raised.value) == "nmi: scikit-learn not installed; pip install deepsim-ext[eval]"
