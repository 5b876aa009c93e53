"""Verification: the LFW protocol against the published formulas, written out as loops; curves; bad input."""

from __future__ import annotations

import importlib
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import interpolate, stats
from sklearn.model_selection import KFold

from deepsim_ext.verification import best_threshold, eer, kfold_accuracy, roc, tar_at_far, val_at_far, verify

TIGHT = {"rel": 1e-12, "abs": 1e-12}
EVALUATIONS = {
    "best_threshold": best_threshold,
    "kfold_accuracy": kfold_accuracy,
    "val_at_far": val_at_far,
    "roc": roc,
    "eer": eer,
    "tar_at_far": lambda d, same: tar_at_far(d, same, [0.1]),
}


def scores(kind: str, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances in [0, 4] and labels; both kinds of pairs in any stretch of four."""
    rng = np.random.default_rng(seed)
    same = (np.arange(pairs) + rng.integers(4)) % 4 < 2
    if kind == "random":
        d = rng.uniform(0, 4, pairs)
    elif kind == "ties":
        d = rng.integers(0, 9, pairs) / 2.0
    elif kind == "on the grid":
        d = rng.choice(np.arange(0, 4, 0.01), pairs)
    elif kind == "float32":
        d = np.where(same, rng.gamma(5, 0.15, pairs), rng.normal(1.8, 0.4, pairs)).clip(0, 4)
        d = d.astype(np.float32)
    elif kind == "perfect":
        d = np.where(same, rng.uniform(0, 1, pairs), rng.uniform(1.5, 4, pairs))
    else:  # "reversed"
        d = np.where(same, rng.uniform(2, 4, pairs), rng.uniform(0, 2.5, pairs))
    return d, same


KINDS = ["random", "ties", "on the grid", "float32", "perfect", "reversed"]


# ---- the protocol, as insightface and facenet compute it ---------------------------------------------------


def accuracy_at(threshold, dist, actual):
    predicted = np.less(dist, threshold)
    tp, tn = np.sum(predicted & actual), np.sum(~predicted & ~actual)
    return float(tp + tn) / dist.size


def val_far_at(threshold, dist, actual):
    predicted = np.less(dist, threshold)
    return (
        float(np.sum(predicted & actual)) / float(np.sum(actual)),
        float(np.sum(predicted & ~actual)) / float(np.sum(~actual)),
    )


def published_accuracy(dist, actual, folds, thresholds):
    accuracies, chosen = [], []
    for train, test in KFold(n_splits=folds, shuffle=False).split(np.arange(len(dist))):
        on_train = [accuracy_at(t, dist[train], actual[train]) for t in thresholds]
        chosen.append(thresholds[int(np.argmax(on_train))])
        accuracies.append(accuracy_at(chosen[-1], dist[test], actual[test]))
    return accuracies, chosen


def published_val(dist, actual, folds, thresholds, far_target):
    vals, fars, chosen = [], [], []
    for train, test in KFold(n_splits=folds, shuffle=False).split(np.arange(len(dist))):
        on_train = np.array([val_far_at(t, dist[train], actual[train])[1] for t in thresholds])
        if np.max(on_train) >= far_target:
            chosen.append(float(interpolate.interp1d(on_train, thresholds, kind="linear")(far_target)))
        else:
            chosen.append(0.0)
        val, far = val_far_at(chosen[-1], dist[test], actual[test])
        vals.append(val)
        fars.append(far)
    return vals, fars, chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pairs", "folds"), [(600, 10), (203, 10), (40, 2), (47, 7)])
def test_accuracy_of_the_lfw_protocol(kind, pairs, folds):
    d, same = scores(kind, pairs, seed=pairs)
    thresholds = np.arange(0, 4, 0.01)
    accuracies, chosen = published_accuracy(d, same, folds, thresholds)
    result = kfold_accuracy(d, same, folds=folds)
    assert result.accuracies.tolist() == accuracies  # counts: to the bit
    assert result.thresholds.tolist() == chosen
    assert result.mean == np.mean(accuracies) and result.std == np.std(accuracies)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [0.0, 1e-3, 0.01, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("pairs", "folds"), [(300, 10), (43, 3)])
def test_validation_rate_of_the_lfw_protocol(kind, far, pairs, folds):
    d, same = scores(kind, pairs, seed=int(1000 * far))
    thresholds = np.arange(0, 4, 0.01)
    vals, fars, chosen = published_val(d, same, folds, thresholds, far)
    result = val_at_far(d, same, far=far, folds=folds, thresholds=thresholds)
    assert result.thresholds.tolist() == pytest.approx(chosen, **TIGHT)
    assert result.rates.tolist() == vals and result.fars.tolist() == fars
    assert result.mean == pytest.approx(np.mean(vals), **TIGHT)
    assert result.std == pytest.approx(np.std(vals), **TIGHT)
    assert result.far == pytest.approx(np.mean(fars), **TIGHT)


def test_the_thresholds_of_the_protocol_are_the_default():
    d, same = scores("float32", 200, 1)
    assert same_results(kfold_accuracy(d, same), kfold_accuracy(d, same, thresholds=np.arange(0, 4, 0.01)))
    assert same_results(val_at_far(d, same), val_at_far(d, same, thresholds=np.arange(0, 4, 0.001)))
    assert same_results(val_at_far(d, same), val_at_far(d, same, far=0.001, folds=10))


def same_results(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_pair_its_own_fold():
    d, same = scores("random", 12, 3)
    accuracies, chosen = published_accuracy(d, same, 12, np.arange(0, 4, 0.01))
    result = kfold_accuracy(d, same, folds=12)
    assert result.accuracies.tolist() == accuracies and result.thresholds.tolist() == chosen


@pytest.mark.parametrize("label", [True, False])
def test_folds_of_one_kind(label):
    """Accuracy is defined without pairs of the other kind; rates are not."""
    d, same = np.linspace(0, 3.9, 40), np.full(40, label)
    accuracies, chosen = published_accuracy(d, same, 10, np.arange(0, 4, 0.01))
    result = kfold_accuracy(d, same)
    assert result.accuracies.tolist() == accuracies and result.thresholds.tolist() == chosen


def test_repeated_false_accept_rates():
    """Flat parts and jumps of the curve, which splines through it cannot take."""
    d = np.array([0.5, 2.5, 0.5, 2.5, 0.5, 2.5, 0.5, 2.5])
    same = np.array([1, 0, 1, 0, 1, 0, 1, 0])
    grid = np.arange(0, 4, 0.01)
    with pytest.raises(ValueError, match="duplicates"):
        interpolate.interp1d(np.repeat([0.0, 1.0], [251, 149]), grid, kind="slinear")
    result = val_at_far(d, same, far=0.3, folds=4, thresholds=grid)
    assert result.thresholds.tolist() == pytest.approx([2.5 + 0.3 * 0.01] * 4, **TIGHT)
    assert result.rates.tolist() == [1] * 4 and result.fars.tolist() == [1] * 4
    # Exactly on a flat part: the highest threshold.
    assert val_at_far(d, same, far=0, folds=4, thresholds=grid).thresholds.tolist() == [grid[250]] * 4


def test_no_threshold_reaches_the_rate_and_all_exceed_it():
    d, same = scores("random", 80, 4)
    unreached = val_at_far(d, same, far=0.5, folds=4, thresholds=[0, 0.1])
    assert unreached.thresholds.tolist() == [0] * 4 and unreached.mean == 0
    exceeded = val_at_far(d, same, far=0.01, folds=4, thresholds=[3.0, 3.5])
    assert exceeded.thresholds.tolist() == [3.0] * 4 and exceeded.far > 0.5


def test_interval_is_students():
    d, same = scores("random", 200, 5)
    for result, values in (
        (kfold_accuracy(d, same), "accuracies"),
        (val_at_far(d, same, far=0.3, folds=5), "rates"),
    ):
        v = getattr(result, values)
        expected = stats.t.interval(0.95, len(v) - 1, loc=np.mean(v), scale=stats.sem(v))
        assert result.interval == pytest.approx(expected, **TIGHT)
        assert result.interval[0] < result.mean < result.interval[1]


def test_an_interval_is_one_of_rates():
    """One pair in a hundred is told wrongly, or one rightly."""
    same = np.arange(100) % 2 == 0
    d = np.where(same, 0.5, 2.5)
    d[0] = 3.5
    for distances, end, bound in ((d, 1, 1.0), (3 - d, 0, 0.0)):
        result = kfold_accuracy(distances, same, thresholds=[1.5])
        assert result.interval[end] == bound and 0 < result.interval[1 - end] < 1


# ---- thresholds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_best_threshold_of_all(kind):
    d, same = scores(kind, 60, 6)
    result = best_threshold(d, same)
    assert result.accuracy == accuracy_at(result.threshold, d.astype(float), same)
    ends = np.unique(d).astype(float)
    tried = np.concatenate([ends, [math.inf]])  # each decides as the first cut above the distance before it
    on_all = [accuracy_at(t, d.astype(float), same) for t in tried]
    assert result.accuracy == max(on_all)
    first = int(np.argmax(on_all))  # the lowest of the best, halfway between its neighbours
    if 0 < first < len(ends):
        assert result.threshold == pytest.approx((ends[first - 1] + ends[first]) / 2, rel=1e-15)
    else:
        assert result.threshold == (ends[0] if first == 0 else np.nextafter(ends[-1], math.inf))


def test_best_of_given_thresholds():
    d, same = scores("ties", 60, 7)
    thresholds = [0.25, 1.0, 1.0, 2.25]
    on_all = [accuracy_at(t, d, same) for t in thresholds]
    assert best_threshold(d, same, thresholds) == (thresholds[int(np.argmax(on_all))], max(on_all))
    assert best_threshold(d, same, torch.tensor([1])) == (1.0, accuracy_at(1.0, d, same))


def test_best_threshold_of_one_kind_and_of_neighbours_in_float64():
    d = np.array([1.0, 2.0])
    assert best_threshold(d, np.array([True, True])) == (np.nextafter(2.0, 3), 1.0)
    assert best_threshold(d, np.array([False, False])) == (1.0, 1.0)
    d = np.array([1.0, np.nextafter(1.0, 2)])
    assert best_threshold(d, np.array([True, False])) == (d[1], 1.0)
    huge = np.array([1e308, 1.5e308])
    assert best_threshold(huge, np.array([True, False])) == (1.25e308, 1.0)


def test_verify_is_less_than():
    d = torch.tensor([0.5, 1.0, 1.5])
    decided = verify(d, 1)
    assert decided.dtype == torch.bool and decided.tolist() == [True, False, False]
    decided = verify(d.numpy(), 1.5)
    assert decided.dtype == bool and decided.tolist() == [True, True, False]
    # In float64, where the float32 0.1 is above 0.1.
    assert verify(torch.tensor([0.1]), 0.1).tolist() == [False]
    assert verify(torch.tensor([0.1]), float(np.float32(0.1)) + 1e-12).tolist() == [True]
    assert verify(torch.empty(0), 1.0).shape == (0,)


# ---- curves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_roc_is_what_its_thresholds_do(kind):
    d, same = scores(kind, 90, 8)
    curve = roc(d, same)
    assert len(curve.far) == len(np.unique(d)) + 1
    assert (curve.far[0], curve.tar[0], curve.far[-1], curve.tar[-1]) == (0, 0, 1, 1)
    assert np.all(np.diff(curve.thresholds) > 0)
    for far, tar, threshold in zip(*curve, strict=True):
        assert val_far_at(threshold, d.astype(float), same) == (tar, far)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_error_rate_is_where_the_lines_cross(kind):
    d, same = scores(kind, 90, 9)
    curve = roc(d, same)
    # On every line between two points: far = a + s b, frr = e + s f; equal where s = (e - a) / (b - f).
    crossings = []
    for i in range(len(curve.far) - 1):
        a, b = curve.far[i], curve.far[i + 1] - curve.far[i]
        e, f = 1 - curve.tar[i], curve.tar[i] - curve.tar[i + 1]
        s = (e - a) / (b - f)
        if 0 <= s <= 1:
            crossings.append((a + s * b, curve.thresholds[i] + s * np.diff(curve.thresholds)[i]))
    result = eer(d, same)
    assert any(result == pytest.approx(crossing, **TIGHT) for crossing in crossings)
    assert all(result.rate == pytest.approx(rate, **TIGHT) for rate, _ in crossings)
    if kind == "perfect":
        assert result.rate == 0 and best_threshold(d, same).accuracy == 1


@pytest.mark.parametrize("kind", KINDS)
def test_true_accept_rates_are_the_best_allowed(kind):
    d, same = scores(kind, 90, 10)
    fars = [0.5, 0.0, 1e-9, 1 / 45, 0.02, 1.0]
    result = tar_at_far(d, same, fars)
    ends = np.concatenate([[-1], np.unique(d)]).astype(float)
    tried = [val_far_at(np.nextafter(t, math.inf), d.astype(float), same) for t in ends]
    for target, tar, far, threshold in zip(fars, *result, strict=True):
        assert tar == max(val for val, reached in tried if reached <= target)
        assert far <= target
        assert val_far_at(threshold, d.astype(float), same) == (tar, far)


# ---- input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVALUATIONS)
def test_tensors_and_arrays_of_all_dtypes(name):
    function = EVALUATIONS[name]
    d, same = scores("ties", 60, 11)  # halves, which float16 and bfloat16 hold
    expected = function(d, same)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        tensor = torch.from_numpy(d).to(dtype).requires_grad_()
        assert same_results(function(tensor, torch.from_numpy(same)), expected)
    assert same_results(function(d.astype(np.float16), same.astype(np.int8)), expected)
    strided = np.repeat(d, 2)[::2]
    assert same_results(function(strided, torch.from_numpy(same).bfloat16()), expected)


def bad_arguments():
    d, same = scores("random", 20, 12)
    floats = "a tensor or array, float32, float64, bfloat16 or float16 of shape [P]"
    with_nan, with_inf = d.copy(), d.copy()
    with_nan[5], with_inf[0] = math.nan, math.inf
    labels = "a tensor or array, bool or 0 and 1, of shape [P]=[20]"
    yield with_nan, same, ValueError, "distances must be finite, got nan at index 5"
    yield torch.tensor(with_inf), same, ValueError, "distances must be finite, got inf at index 0"
    yield d[:, None], same, ValueError, f"distances must be {floats}, got float64 [20, 1]"
    yield d.astype(int), same, TypeError, f"distances must be {floats}, got int64 [20]"
    yield d.tolist(), same, TypeError, f"distances must be {floats}, got list"
    yield d[:0], same[:0], ValueError, "distances must be of shape [P] with P >= 1, got float64 [0]"
    yield d, same[:-1], ValueError, f"same must be {labels}, got bool [19]"
    yield d, same.tolist(), TypeError, f"same must be {labels}, got list"
    yield d, same.astype(str), TypeError, f"same must be {labels}, got <U5 [20]"
    yield d, same * 2, ValueError, f"same must be bool or 0 and 1, got 2 at index {np.argmax(same)}"
    nan_label = torch.tensor(same).float()
    nan_label[3] = math.nan
    yield d, nan_label, ValueError, "same must be bool or 0 and 1, got nan at index 3"


@pytest.mark.parametrize("name", EVALUATIONS)
def test_bad_distances_and_labels_word_for_word(name):
    for distances, same, kind, text in bad_arguments():
        with pytest.raises(kind) as caught:
            EVALUATIONS[name](distances, same)
        assert str(caught.value) == f"{name}: {text}"


def test_other_errors_word_for_word():
    d, same = scores("random", 20, 12)
    ascending = "thresholds must be a tensor, array or sequence of finite ascending numbers"
    in_order = np.arange(20) < 10
    each_fold = "of both kinds in each of the 2 folds, cut in the order of the pairs"
    for call, kind, text in [
        (
            lambda: kfold_accuracy(d, same, folds=1),
            ValueError,
            "folds must be an integer from 2 to the number",
        ),
        (lambda: kfold_accuracy(d, same, folds=21), ValueError, "of pairs P=20, got int 21"),
        (lambda: val_at_far(d, same, folds=5.0), TypeError, "of pairs P=20, got float 5.0"),
        (
            lambda: kfold_accuracy(d, same, thresholds=[1, 0]),
            ValueError,
            f"{ascending}, got numbers in another",
        ),
        (
            lambda: kfold_accuracy(d, same, thresholds=[0, math.nan]),
            ValueError,
            f"{ascending}, got nan among",
        ),
        (lambda: kfold_accuracy(d, same, thresholds=[]), ValueError, f"{ascending}, got shape [0]"),
        (lambda: best_threshold(d, same, ["1"]), TypeError, f"best_threshold: {ascending}, got list"),
        (lambda: val_at_far(d, same, thresholds=1.0), TypeError, f"{ascending}, got float 1.0"),
        (lambda: val_at_far(d, same, far=1.5), ValueError, "far must be a number from 0 to 1, got float 1.5"),
        (lambda: val_at_far(d, same, far="0"), TypeError, 'far must be a number from 0 to 1, got "0"'),
        (
            lambda: val_at_far(d, in_order, folds=2),
            ValueError,
            f"val_at_far: same must be {each_fold}, got no different pair in fold 1",
        ),
        (
            lambda: val_at_far(d, ~in_order, folds=2),
            ValueError,
            f"val_at_far: same must be {each_fold}, got no different pair in fold 2",
        ),
        (lambda: tar_at_far(d, same, [0.1, -1]), ValueError, "numbers from 0 to 1, got -1.0 among them"),
        (lambda: verify(d, math.nan), ValueError, "verify: threshold must be a finite number, got float nan"),
        (lambda: verify(d, True), TypeError, "verify: threshold must be a finite number, got bool True"),
    ]:
        with pytest.raises(kind, match=re.escape(text)):
            call()


@pytest.mark.parametrize("name", ["roc", "eer", "tar_at_far"])
@pytest.mark.parametrize(("label", "word"), [(True, "same"), (False, "different")])
def test_curves_need_both_kinds(name, label, word):
    with pytest.raises(ValueError) as caught:
        EVALUATIONS[name](np.arange(5.0), np.full(5, label))
    assert (
        str(caught.value)
        == f"{name}: same must be of both kinds, same and different, got 5 {word} pairs only"
    )


ANY_ARRAY = st.one_of(
    st.none(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 1), max_size=4),
    st.builds(
        lambda shape, dtype, values: np.resize(np.array(values, dtype=object), shape).astype(dtype),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from(["f2", "f4", "f8", ">f4", "i8", "u1", "?", "c16", "U3", "O"]),
        st.lists(st.sampled_from([0, 1, 2, 0.5, math.nan, math.inf]), min_size=1, max_size=6).filter(
            lambda values: all(v == v and abs(v) < 9 for v in values)
        ),
    ),
    st.builds(torch.zeros, st.lists(st.integers(0, 4), max_size=3).map(tuple)),
    st.just(torch.zeros(4).to_sparse()),
    st.just(torch.tensor([0.0, math.nan, 1.0, 2.0])),
    st.just(torch.tensor([0, 1, 1, 0])),
)


@given(distances=ANY_ARRAY, same=ANY_ARRAY, name=st.sampled_from(sorted(EVALUATIONS)))
def test_whatever_comes_there_is_a_result_or_an_error_that_names_the_argument(distances, same, name):
    try:
        result = EVALUATIONS[name](distances, same)
    except (TypeError, ValueError) as problem:
        assert re.match(rf"{name}: (distances|same|folds) must be .*, got ", str(problem)), problem
    else:
        assert all(np.isfinite(part).all() for part in result)


# ---- packages ----------------------------------------------------------------------------------------------


def test_nothing_of_the_extra_is_imported_before_it_is_used():
    code = (
        "import sys, deepsim_ext, deepsim_ext.verification, deepsim_ext.cli;"
        "print([m for m in ('sklearn', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["kfold_accuracy", "val_at_far", "roc", "eer", "tar_at_far"])
def test_a_missing_extra_is_named(name, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError) as caught:
        EVALUATIONS[name](*scores("random", 60, 13))
    assert str(caught.value) == f'{name}: scikit-learn is not installed; pip install "deepsim-ext[eval]"'
