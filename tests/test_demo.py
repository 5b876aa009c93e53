"""The demo: its exit codes and what it writes."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepsim_ext import cli, demo, functional


@pytest.fixture
def installed() -> None:
    """Skips where the extra `demo` is not installed."""
    for module in demo.PACKAGES:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the demo needs {module}")


@pytest.fixture
def no_memory_measured(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh processes, which take most of the time of a quick run."""
    from deepsim_ext.demo import metric_learning, style_transfer

    for module in (metric_learning, style_transfer):
        monkeypatch.setattr(module, "peak_extra_bytes", lambda *sizes: 0)


def arguments(*options: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


@pytest.mark.slow
def test_quick_run(installed: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deepsim_ext", "demo", "--quick", "--output", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0, process.stderr

    record = json.loads((tmp_path / "report.json").read_text())
    assert record["passed"]
    assert all(check["passed"] for check in record["checks"])
    assert len(record["rows"]) == 4
    for row in record["rows"]:
        assert row["milliseconds"] > 0 and row["torch_milliseconds"] > 0
        assert row["replaced"] in process.stdout
        assert row["replaced"] in (tmp_path / "report.md").read_text()
    large = next(row for row in record["rows"] if "4096" in row["input"])
    assert large["peak_bytes"] < 32 * 2**20 < large["torch_peak_bytes"]  # the N x N matrix has 64 MiB
    numbers = record["numbers"]["Metric learning"]
    assert len(numbers["losses"]) == len(numbers["reference_losses"]) > 0
    assert_every_loss_is_shown(process.stdout, tmp_path)
    assert len(record["figures"]) == 5
    for name in record["figures"]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def assert_every_loss_is_shown(printed: str, output: Path) -> None:
    """A line for each of four losses, called in two ways, in the terminal and in the report."""
    record = json.loads((output / "report.json").read_text())
    accuracies = record["numbers"]["Every loss, called in two ways"]["accuracies"]
    assert len(accuracies) == 8
    for loss, way, (single, several) in accuracies:
        assert 0.5 < single < several <= 1
        line = rf"\| {loss} +\| {way} +\| +{single:.3f} \| +{several:.3f} \|"
        for text in (printed, (output / "report.md").read_text()):
            assert re.search(line, text)


def test_quick_run_of_every_loss(installed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(arguments("--quick", "--only", "losses", "--output", tmp_path)) == 0
    assert_every_loss_is_shown(capsys.readouterr().out, tmp_path)


def test_every_loss_by_functional_and_compat(installed: None) -> None:
    from deepsim_ext.demo import losses

    x, labels = torch.randn(24, 8, dtype=torch.float64, requires_grad=True), torch.arange(24) // 3
    ours, theirs = losses.functional_losses(), losses.compat_losses()
    assert ours.keys() == theirs.keys()
    for name in ours:
        values = [losses_of[name](x, labels) for losses_of in (ours, theirs)]
        assert values[0] > 0
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in values))


@pytest.mark.parametrize(
    ("part", "function"),
    [
        ("metric", "batch_hard_triplet_loss"),
        ("losses", "batch_semi_hard_triplet_loss"),
        ("style", "style_loss"),
    ],
)
def test_wrong_loss_fails(
    no_memory_measured: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str, function: str
) -> None:
    right = getattr(functional, function)
    monkeypatch.setattr(functional, function, lambda *args, **kwargs: 1.001 * right(*args, **kwargs))
    assert demo.run(arguments("--quick", "--only", part, "--output", tmp_path)) == 1
    record = json.loads((tmp_path / "report.json").read_text())
    assert not record["passed"]


@pytest.mark.slow
def test_wrong_gradient_fails(
    no_memory_measured: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = functional.batch_hard_triplet_loss

    def wrong(embeddings: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        # Adam does not care for a factor, so leave out a row.
        return right(torch.cat([embeddings[:1].detach(), embeddings[1:]]), *args, **kwargs)

    monkeypatch.setattr(functional, "batch_hard_triplet_loss", wrong)
    assert demo.run(arguments("--quick", "--only", "metric", "--output", tmp_path)) == 1
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert sorted(check["name"] for check in checks if not check["passed"]) == [
        "its gradient on the same embeddings, relative difference",
        "loss curves of the two trainings, relative difference",
    ]


def test_missing_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "skimage" else find_spec(name)
    )
    assert demo.run(arguments("--output", tmp_path)) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "scikit-image" in message and 'pip install "deepsim-ext[demo]"' in message


def test_interrupt(installed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deepsim_ext.demo import metric_learning

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metric_learning, "load_images", interrupted)
    assert cli.main(["demo", "--only", "metric", "--output", str(tmp_path)]) == 130


def test_output_is_a_file(installed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert cli.main(["demo", "--output", str(file)]) == 2
    assert capsys.readouterr().err == f"demo: [Errno 17] File exists: '{file}'\n"


def test_eager_versions_agree() -> None:
    from deepsim_ext import reference
    from deepsim_ext.demo import torch_versions

    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(40, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.arange(40) % 5
    for soft in (False, True):
        eager = torch_versions.batch_hard_triplet_loss(embeddings, labels, 0.2, soft=soft)
        exact = reference.batch_hard_triplet_loss(embeddings, labels, margin=0.2, soft=soft)
        torch.testing.assert_close(eager, exact)
        torch.testing.assert_close(*(torch.autograd.grad(loss, embeddings)[0] for loss in (eager, exact)))

    features = [torch.randn(2, c, 6, 5, dtype=torch.float64, generator=generator) for c in (3, 4)]
    targets = [torch.randn(2, c, c, dtype=torch.float64, generator=generator) for c in (3, 4)]
    eager = torch_versions.style_loss(features, targets, [1.0, 3.0])
    torch.testing.assert_close(eager, reference.style_loss(features, targets, weights=[1.0, 3.0]))
