"""`python -m deepsim_ext verify`: the functions' figures, whole files, errors of one line."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepsim_ext.cli import main
from deepsim_ext.verification import (
    balanced_pairs,
    best_threshold,
    command,
    eer,
    kfold_accuracy,
    pair_distances,
    plots,
    tar_at_far,
    val_at_far,
)

FILES = ["distances.png", "roc.png", "verify.json"]


@pytest.fixture
def data(tmp_path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A folder with embeddings.npy and labels.npy, and the arrays: unit vectors of 30 classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 6)
    x = rng.normal(size=(30, 16))[labels] + rng.normal(size=(180, 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    np.save(tmp_path / "embeddings.npy", x)
    np.save(tmp_path / "labels.npy", labels)
    return tmp_path, x, labels


def verify(folder: Path, *options: str) -> int:
    embeddings = [] if "--embeddings" in options else ["--embeddings", str(folder / "embeddings.npy")]
    return main(["verify", *embeddings, "-o", str(folder / "out"), *options])


def write_pairs(path: Path, pairs, same) -> None:
    path.write_text("".join(f"{i},{j},{int(s)}\n" for (i, j), s in zip(pairs, same, strict=True)))


def expected(d, same, folds, top):
    return {
        "accuracy": kfold_accuracy(d, same, folds=folds, thresholds=np.arange(400) * (top / 400)),
        "validation_rate": val_at_far(d, same, folds=folds, thresholds=np.arange(4000) * (top / 4000)),
        "best_threshold": best_threshold(d, same),
        "equal_error_rate": eer(d, same),
    }


def assert_report(folder: Path, d, same, folds=10, top=4.0) -> dict:
    report = json.loads((folder / "out" / "verify.json").read_text(), parse_constant=pytest.fail)
    assert report["same_pairs"] == same.sum() and report["different_pairs"] == (~same).sum()
    assert report["folds"] == folds and report["thresholds_up_to"] == pytest.approx(top)
    for name, result in expected(d, same, folds, top).items():
        for field, value in result._asdict().items():
            assert report[name][field] == pytest.approx(np.array(value).tolist(), rel=1e-12), (name, field)
    rates = tar_at_far(d, same, [0.1, 0.01, 0.001, 0.0001])
    for column, values in zip(("tar", "far", "threshold"), rates, strict=True):
        assert [row[column] for row in report["tar_at_far"]] == values.tolist()
    assert sorted(p.name for p in (folder / "out").iterdir()) == FILES
    for name in FILES[:2]:
        assert (folder / "out" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return report


# ---- what it says ------------------------------------------------------------------------------------------


def test_pairs_of_a_file(data, capsys):
    folder, x, labels = data
    pairs, same = balanced_pairs(labels, 200, seed=3)
    write_pairs(folder / "pairs.csv", pairs, same)
    assert verify(folder, "--pairs", str(folder / "pairs.csv"), "--folds", "5") == 0
    d = pair_distances(x, pairs)
    report = assert_report(folder, d, same, folds=5)
    assert 0.7 < report["accuracy"]["mean"] < 1  # something to tell apart, not too easily
    # Bit for bit the protocol's thresholds.
    assert report["accuracy"]["thresholds"] == kfold_accuracy(d, same, folds=5).thresholds.tolist()
    out, err = capsys.readouterr()
    assert err == ""
    accuracy = report["accuracy"]
    assert "pairs          200 same, 200 different\n" in out
    assert (
        f"accuracy       {accuracy['mean']:.4f} ± {accuracy['std']:.4f} over 5 folds, 95 % interval " in out
    )
    assert f"\nEER            {report['equal_error_rate']['rate']:.4f} at " in out
    assert f"\nthreshold      {report['best_threshold']['threshold']:.4g} (sqeuclidean), accuracy " in out
    assert re.search(rf"\n +0\.01 +{report['tar_at_far'][1]['tar']:.4f} ", out)
    assert out.endswith("out: verify.json, roc.png, distances.png\n")


def test_pairs_drawn_from_labels(data):
    folder, x, labels = data
    options = ("--labels", str(folder / "labels.npy"))
    for more, count, seed in (((), 450, 0), (("--count", "100", "--seed", "5"), 100, 5)):
        assert verify(folder, *options, *more) == 0
        pairs, same = balanced_pairs(labels, count, seed=seed)
        assert_report(folder, pair_distances(x, pairs), same)


@pytest.mark.parametrize(("distance", "top"), [("euclidean", 2), ("cosine", 2)])
def test_other_distances(data, distance, top):
    folder, x, labels = data
    assert verify(folder, "--labels", str(folder / "labels.npy"), "--distance", distance) == 0
    pairs, same = balanced_pairs(labels, 450)
    report = assert_report(folder, pair_distances(x, pairs, distance=distance), same, top=top)
    assert report["distance"] == distance


def test_embeddings_of_any_length(data, monkeypatch):
    """Thresholds reach as far as distances do: the protocol's, up to 4, would call all pairs different."""
    monkeypatch.setattr(command, "CHUNK", 50)
    folder, x, labels = data
    pairs, same = balanced_pairs(labels, 450)
    for scale in (100, 1e-3):
        np.save(folder / "embeddings.npy", x * np.float32(scale))
        assert verify(folder, "--labels", str(folder / "labels.npy")) == 0
        d = pair_distances(x * np.float32(scale), pairs)
        report = assert_report(folder, d, same, top=float(d.max()))
        assert report["accuracy"]["mean"] > 0.7
        # Directions only: what unit vectors give.
        assert verify(folder, "--labels", str(folder / "labels.npy"), "--distance", "cosine") == 0
        assert_report(folder, pair_distances(x * np.float32(scale), pairs, distance="cosine"), same, top=2)


def test_pairs_that_are_told_apart_perfectly_and_not_at_all(data):
    folder, _, labels = data
    pairs, same = balanced_pairs(labels, 100)
    for x in (np.eye(30, dtype=np.float32)[labels], np.ones((180, 2), np.float32)):
        np.save(folder / "embeddings.npy", x)
        write_pairs(folder / "pairs.csv", pairs, same)
        assert verify(folder, "--pairs", str(folder / "pairs.csv")) == 0
        d = pair_distances(x, pairs)
        assert_report(folder, d, same, top=4 if x.shape[1] == 30 else 0)


# ---- what goes wrong ---------------------------------------------------------------------------------------


def failed(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("verify: ")
    return err.removeprefix("verify: ").rstrip("\n")


def test_errors_are_one_line_and_leave_nothing(data, capsys):
    folder, x, labels = data
    csv, npy = folder / "bad.csv", folder / "bad.npy"
    pairs, same = balanced_pairs(labels, 20)
    in_order = np.argsort(~same, kind="stable")
    with_nan = x.copy()
    with_nan[pairs[0, 0]] = np.nan

    def case(content, name="--pairs", *more):
        path = npy if isinstance(content, np.ndarray) else csv
        if path is npy:
            np.save(npy, content)
        else:
            csv.write_text(content)
        return [name, str(path), *more]

    def lines(pairs, same):
        write_pairs(csv, pairs, same)
        return csv.read_text()

    good = lines(pairs, same)
    for make, text in [
        (lambda: case("0,1\n"), f"read_pairs: {csv}, line 1, must be two indices and 0 or 1, got '0,1'"),
        (lambda: case("0,180,1\n0,1,0\n"), "pair_distances: pairs must be indices of the N=180 rows"),
        (
            lambda: case("0,1,1\n"),
            "roc: same must be of both kinds, same and different, got 1 same pairs only",
        ),
        (lambda: case("0,1,1\n0,7,0\n"), "kfold_accuracy: folds must be an integer from 2 to the number of"),
        (
            lambda: case(lines(pairs[in_order], same[in_order])),
            "val_at_far: same must be of both kinds in each",
        ),
        (lambda: case(good, "--pairs", "--count", "3"), "--count goes with --labels, got it with --pairs"),
        (lambda: case(good, "--pairs", "--seed", "0"), "--seed goes with --labels, got it with --pairs"),
        (lambda: case(good, "--pairs", "--folds", "1"), "kfold_accuracy: folds must be an integer from 2"),
        (
            lambda: case(labels[1:], "--labels"),
            "--labels must be one per row of the embeddings [180], got [179]",
        ),
        (
            lambda: case(labels / 2, "--labels"),
            f"load_labels: {npy} must be integers of shape [N], got float64",
        ),
        (
            lambda: case(labels * 0, "--labels"),
            f"--labels: {npy} has no pair of different labels",
        ),
        (
            lambda: case(np.arange(180), "--labels"),
            f"--labels: {npy} has no pair of the same label",
        ),
        (
            lambda: case(labels, "--labels", "--count", "451"),
            "balanced_pairs: count must be at most 450, for",
        ),
        (lambda: case(labels, "--labels", "--seed", "-1"), "balanced_pairs: seed must be an integer >= 0"),
        (
            lambda: [*case(with_nan, "--embeddings"), *case(good)],
            "pair_distances: embeddings must be finite, and so their squared distances, got nan between",
        ),
        (
            lambda: [*case(x[0], "--embeddings"), *case(good)],
            f"load_embeddings: {npy} must be float16, float32 or float64 of shape [N, D] with D >= 1, got",
        ),
        (
            lambda: ["--embeddings", str(folder / "none.npy"), *case(good)],
            f"load_embeddings: {folder}/none.npy must be a .npy file, got No such file or directory",
        ),
        (
            lambda: [*case(good), "-o", str(folder / "labels.npy")],
            f"--output must be a folder, got the file {folder}/labels.npy",
        ),
    ]:
        assert verify(folder, *make()) == 2, text
        assert failed(capsys).startswith(text)
        assert not (folder / "out").exists()
    np.testing.assert_array_equal(np.load(folder / "labels.npy"), labels)


def test_wrong_options_are_argparses(data, capsys):
    folder = data[0]
    for options in ([], ["--pairs", "a.csv", "--labels", "b.npy"], ["--labels", "b.npy", "--distance", "l2"]):
        with pytest.raises(SystemExit) as caught:
            verify(folder, *options)
        assert caught.value.code == 2
    assert "--pairs" in capsys.readouterr().err


@given(st.binary(max_size=40), st.sampled_from(["--pairs", "--labels", "--embeddings"]))
def test_any_bytes_are_an_error_of_one_line(tmp_path_factory, content, option):
    folder = tmp_path_factory.getbasetemp()
    (folder / "any").write_bytes(content)
    np.save(folder / "embeddings.npy", np.eye(3))
    options = [option, str(folder / "any")]
    if option == "--embeddings":
        options += ["--pairs", str(folder / "any")]
    assert verify(folder, *options) == 2
    assert not (folder / "out").exists()


def test_a_failure_while_drawing_leaves_nothing_and_the_old_files_whole(data, capsys, monkeypatch):
    folder = data[0]
    options = ("--labels", str(folder / "labels.npy"))

    def full(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(plots, "_png", full)
        assert verify(folder, *options) == 2
    assert failed(capsys) == "disk full" and not (folder / "out").exists()
    assert verify(folder, *options) == 0
    before = {name: (folder / "out" / name).read_bytes() for name in FILES}
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        assert verify(folder, *options, "--count", "50") == 2
    assert failed(capsys) == "disk full"
    assert {p.name: p.read_bytes() for p in (folder / "out").iterdir()} == before


def test_ctrl_c_saves_nothing(data, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "kfold_accuracy", interrupted)
    assert verify(data[0], "--labels", str(data[0] / "labels.npy")) == 130
    assert failed(capsys) == "interrupted, nothing is saved" and not (data[0] / "out").exists()


@pytest.mark.parametrize("package", ["scikit-learn", "matplotlib"])
def test_a_missing_package_is_named(data, capsys, monkeypatch, package):
    real = importlib.import_module

    def missing(module, *arguments):
        if module.split(".")[0] == {"scikit-learn": "sklearn"}.get(package, package):
            raise ModuleNotFoundError(module)
        return real(module, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert verify(data[0], "--labels", str(data[0] / "labels.npy")) == 1
    assert failed(capsys).endswith(f'{package} is not installed; pip install "deepsim-ext[eval]"')
    assert not (data[0] / "out").exists()
