"""profile-mining: what it measures, what it writes, and what it says to bad input."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deepsim_ext import batch_hard_triplet_loss, profile_mining
from deepsim_ext.cli import main

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in profile_mining.PACKAGES),
    reason="needs the extra profile",
)

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["--rows", "60", "--dims", "8", "--seconds", "0.01"]


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peaks are not what is tested."""
    from deepsim_ext.profile_mining import measure

    monkeypatch.setattr(measure, "PRODUCT_SIDE", 64)
    monkeypatch.setattr(measure, "COPY_BYTES", 4096)


def profile(folder: Path, *options: str) -> dict:
    assert main(["profile-mining", "--output", str(folder), *options]) == 0
    return json.loads((folder / "profile.json").read_text())


def test_every_combination_becomes_a_record(tmp_path, capsys):
    grid = ["--rows", "60", "90", "--dims", "8", "--dtypes", "float32", "bfloat16", "--per-class", "3", "5"]
    losses = ["--losses", *profile_mining.LOSSES]
    (tmp_path / "of_others.txt").touch()
    found = profile(tmp_path, *grid, *losses, "--distances", "euclidean", "cosine", "--seconds", "0.01")
    records = found["records"]
    assert len(records) == 2 * 2 * 2 * len(profile_mining.LOSSES) * 2
    skipped = [r for r in records if "skipped" in r]
    assert {(r["loss"], r["distance"]) for r in skipped} == {("torch_eager", "cosine")}
    for r in records:
        if r in skipped:
            continue
        assert 0 < r["forward_ms"]["p20"] <= r["forward_ms"]["p50"] <= r["forward_ms"]["p80"]
        seconds = r["both_ms"]["p50"] / 1e3
        assert r["anchors_per_s"] == pytest.approx(r["rows"] / seconds)
        assert r["pairs_per_s"] == pytest.approx(r["rows"] ** 2 / seconds)
        assert r["gflops"] == pytest.approx(r["rows"] ** 2 * r["dim"] / r["forward_ms"]["p50"] / 1e6)
        assert r["share_of_product"] > 0 and r["share_of_copy"] > 0 and r["peak_bytes"] >= 0
        assert r["valid_anchors"] == r["rows"]
        stages = {
            "mine": {"sort", "centre", "pack", "tiles"},
            "torch_eager": set(),
            "semi_hard": {"sort", "centre", "pack", "positives", "tiles", "recompute", "gradient"},
            "batch_all": {"sort", "centre", "pack", "positives", "tiles", "gradient"},
        }.get(r["loss"], {"sort", "centre", "pack", "tiles", "recompute", "backward"})
        assert set(r["stages_ms"]) == stages
        assert (r["backward_ms"]["p50"] == 0) == (r["loss"] == "mine")
    printed = capsys.readouterr().out
    assert printed.endswith(f"written to {tmp_path}: profile.csv, profile.json, roofline.png\n")
    assert "anchors/s" in printed and "recompute" in printed and "is for Euclidean distances" in printed
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert len(rows) == len(records)
    assert float(rows[0]["stages_tiles_ms"]) == records[0]["stages_ms"]["tiles"]
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_own_data_and_its_statistics(tmp_path):
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(40, 6, generator=g), torch.randint(5, (40,), generator=g)
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy().astype(np.int32))
    own = ["--embeddings", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "labels.npy")]
    (record,) = profile(tmp_path / "out", *own, "--seconds", "0.01", "--margin", "0.1")["records"]
    exact = batch_hard_triplet_loss(x, labels, margin=0.1, return_stats=True)
    assert (record["rows"], record["dim"], record["per_class"]) == (40, 6, 0)
    assert record["loss_value"] == pytest.approx(exact.loss.item())
    assert record["active_fraction"] == pytest.approx(exact.active_fraction.item())
    assert record["valid_anchors"] == exact.valid_anchors.item()


def test_own_data_in_its_own_dtype_stays_as_it_is(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 3)))
    np.save(tmp_path / "labels.npy", np.arange(20) // 4)
    own = ["--embeddings", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "labels.npy")]
    grid = ["--dtypes", "float64", "float32", "--losses", "batch_hard", "mine", "--seconds", "0.01"]
    assert all("both_ms" in r for r in profile(tmp_path / "out", *own, *grid)["records"])


def test_the_trace_is_of_a_case_that_ran(tmp_path, monkeypatch):
    from deepsim_ext.profile_mining import measure

    monkeypatch.setattr(measure, "_available_bytes", lambda device: 1000.0)
    profile(tmp_path, *QUICK, "--trace", "--losses", "torch_eager", "batch_hard")
    assert "deepsim_ext::tiles" in (tmp_path / "trace.json").read_text()


def test_the_trace_has_the_stages_as_ranges(tmp_path):
    profile(tmp_path, *QUICK, "--trace")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e.get("name") for e in events]
    for stage in ("sort", "centre", "pack", "tiles", "recompute", "backward"):
        assert names.count(f"deepsim_ext::{stage}") == names.count("step") == 3


def test_a_case_that_fails_is_told_and_the_others_are_kept(tmp_path, monkeypatch, capsys):
    from deepsim_ext.profile_mining import measure

    def fail(embeddings: torch.Tensor, *_: object) -> None:
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(measure.torch_versions, "batch_hard_triplet_loss", fail)
    options = [*QUICK, "--losses", "torch_eager", "batch_hard", "--output", str(tmp_path)]
    assert main(["profile-mining", *options]) == 1
    records = json.loads((tmp_path / "profile.json").read_text())["records"]
    assert records[0]["failed"] == "RuntimeError: no room"
    assert "both_ms" in records[1]
    assert "failed: RuntimeError: no room" in capsys.readouterr().out


def test_what_does_not_fit_is_skipped(tmp_path, monkeypatch):
    from deepsim_ext.profile_mining import measure

    monkeypatch.setattr(measure, "_available_bytes", lambda device: 1000.0)
    records = profile(tmp_path, *QUICK, "--losses", "torch_eager", "batch_hard")["records"]
    assert records[0]["skipped"].startswith("needs about 0.0 GiB")
    assert "both_ms" in records[1]


def test_ctrl_c_keeps_the_cases_so_far(tmp_path, monkeypatch, capsys):
    from deepsim_ext.profile_mining import measure

    real, calls = measure.profile, []

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(measure, "profile", interrupted)
    assert main(["profile-mining", *QUICK, "--dims", "4", "8", "--output", str(tmp_path)]) == 130
    assert len(json.loads((tmp_path / "profile.json").read_text())["records"]) == 1
    assert capsys.readouterr().err == "\nprofile-mining: interrupted; the cases so far are written\n"


@pytest.mark.parametrize("where", ["peaks", "profile"])
def test_ctrl_c_before_the_first_case_is_through_writes_nothing(tmp_path, monkeypatch, capsys, where):
    from deepsim_ext.profile_mining import measure

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, where, interrupted)
    assert main(["profile-mining", *QUICK, "--output", str(tmp_path)]) == 130
    left = "no case was finished, nothing is written"
    assert capsys.readouterr().err == f"\nprofile-mining: interrupted; {left}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 2))}, "--embeddings and --labels go together"),
        (
            {"x": np.zeros(3), "y": np.zeros(3, int)},
            "expected floating point of shape [N, D] with N, D >= 1, got float64 [3]",
        ),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "with N, D >= 1, got float64 [0, 2]"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4, int)}, "expected integers of shape [3], got int64 [4]"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "expected integers of shape [3], got float64 [3]"),
        ({"x": np.array([{}], dtype=object), "y": np.zeros(1, int)}, "no array that NumPy can read"),
    ],
)
def test_unusable_files_are_one_line(tmp_path, capsys, arrays, message):
    options = ["--output", str(tmp_path / "out")]
    for name, option in (("x", "--embeddings"), ("y", "--labels")):
        if name in arrays:
            np.save(tmp_path / f"{name}.npy", arrays[name], allow_pickle=True)
            options += [option, str(tmp_path / f"{name}.npy")]
    assert main(["profile-mining", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("profile-mining: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--rows", "--dims", "--per-class"])
def test_sizes_of_ones_own_data_are_not_asked_for(tmp_path, capsys, option):
    options = ["--embeddings", "x.npy", "--labels", "y.npy", "--output", str(tmp_path / "out")]
    assert main(["profile-mining", *options, option, "10"]) == 2
    assert capsys.readouterr().err == f"profile-mining: {option} does not go with --embeddings\n"


def test_an_output_that_is_no_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["profile-mining", *QUICK, "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"profile-mining: [Errno 17] File exists: '{tmp_path}/file'\n"


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--rows", "abc", "an integer >= 1"),
        ("--dims", "0", "an integer >= 1"),
        ("--seconds", "0", "a finite number > 0"),
        ("--seconds", "-1", "a finite number > 0"),
        ("--seconds", "nan", "a finite number > 0"),
        ("--margin", "inf", "a finite number >= 0"),
    ],
)
def test_wrong_values_are_argparses(capsys, option, value, expected):
    with pytest.raises(SystemExit, match="2"):
        main(["profile-mining", option, value])
    assert f"argument {option}: must be {expected}, got '{value}'\n" in capsys.readouterr().err


def test_the_profiler_is_silent(tmp_path):
    options = [*QUICK, "--output", str(tmp_path)]
    command = [sys.executable, "-m", "deepsim_ext", "profile-mining", *options]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0 and "USDT" not in process.stderr


@pytest.mark.parametrize("device", ["nowhere", "meta"])
def test_an_unusable_device_is_one_line(tmp_path, capsys, device):
    assert main(["profile-mining", *QUICK, "--devices", device, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"profile-mining: device {device}: " in error and error.count("\n") == 1


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(profile_mining.PACKAGES, "no_such_package", "no-such-package")
    assert main(["profile-mining"]) == 1
    assert 'no-such-package not installed; pip install "deepsim-ext[profile]"' in capsys.readouterr().err
