"""The training script: it learns, goes on in the same bits where it was killed, refuses what cannot work."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepsim_ext._threads import one_thread
from deepsim_ext.examples.train import checkpoints, data, network, training
from deepsim_ext.examples.train.command import PACKAGES, main

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in PACKAGES), reason="needs the extra train"
)
EPOCH = 13  # steps: 360 digits in 63 groups of up to 6, five to a batch
ARGUMENTS = ["--data", "digits", "--held-out", "0.8", "--classes", "5", "--samples", "6", "--device", "cpu"]
ARGUMENTS += ["--epochs", "2", "--checkpoint-every", "5"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def train(out: Path, *arguments: str) -> int:
    return main([*ARGUMENTS, "--out", str(out), *arguments])


def records(out: Path) -> list[dict[str, float]]:
    """What was logged, without times."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "samples_per_second"} for line in lines]


def kinds(out: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in records(out)]


WHOLE = [("evaluation", 0)]
for s in range(1, 2 * EPOCH + 1):
    WHOLE += [("step", s)] + [("evaluation", s)] * (s % EPOCH == 0)


class Killed(BaseException):
    pass


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """Does something in the middle of a step, once."""

    def install(step: int, act: Callable[[], None]) -> None:
        update = training.Training.update

        def watched(self: training.Training, *arguments):
            result = update(self, *arguments)
            if self.step == step:
                monkeypatch.setattr(training.Training, "update", update)
                act()
            return result

        monkeypatch.setattr(training.Training, "update", watched)

    return install


def kill() -> None:
    raise Killed


class Dropout(network.EmbeddingNetwork):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.features.append(nn.Dropout(0.3))


# ---- the curve ---------------------------------------------------------------------------------------------


def test_it_learns_and_logs(tmp_path):
    assert train(tmp_path / "run", "--epochs", "4") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    evaluations = [line["r_precision"] for line in lines if line["kind"] == "evaluation"]
    assert len(evaluations) == 5 and evaluations[0] < 0.6 and evaluations[-1] > 0.8
    steps = [line for line in lines if line["kind"] == "step"]
    assert [(line["step"], line["epoch"]) for line in steps] == [
        (i + 1, i // EPOCH) for i in range(4 * EPOCH)
    ]
    assert all(line["samples_per_second"] > 0 and line["triplets"] == 30 for line in steps)
    assert {"loss", "active_fraction", "mean_d_ap", "mean_d_an"} <= steps[0].keys()
    rates = [line["lr"] for line in steps]
    assert rates[0] == 1e-3 and rates == sorted(rates, reverse=True) and rates[-1] < 1e-5
    learnt = network.load(tmp_path / "run" / "network.pt")
    assert learnt(torch.rand(3, 1, 8, 8)).norm(dim=1).allclose(torch.ones(3))


@pytest.mark.parametrize(
    ("stop", "arguments"),
    [
        (3, []),  # before the first checkpoint
        (8, ["--schedule", "constant", "--loss", "contrastive"]),
        (EPOCH, ["--workers", "2"]),
        (18, ["--augment", "--loss", "semi_hard", "--checkpoint-every", "4"]),
    ],
)
def test_killed_and_resumed_it_has_the_same_curve(tmp_path, monkeypatch, at_step, stop, arguments):
    monkeypatch.setattr(network, "EmbeddingNetwork", Dropout)  # which draws random numbers
    assert train(tmp_path / "whole", *arguments) == 0
    at_step(stop, kill)
    with pytest.raises(Killed):
        train(tmp_path / "killed", *arguments)
    assert train(tmp_path / "killed", *arguments, "--resume") == 0
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert kinds(tmp_path / "whole") == WHOLE
    learnt = [torch.load(tmp_path / name / "network.pt")["weights"] for name in ("whole", "killed")]
    assert all(torch.equal(learnt[0][name], learnt[1][name]) for name in learnt[0])


def test_it_goes_on_from_the_last_whole_checkpoint(tmp_path, monkeypatch, at_step, capsys):
    """Killed while it saves, and with half a line in its log."""
    assert train(tmp_path / "whole") == 0
    save = checkpoints.dcp.save

    def killed(state, *, checkpoint_id: Path) -> None:
        save(state, checkpoint_id=checkpoint_id)
        if "15" in checkpoint_id.name:
            next(checkpoint_id.glob("*.distcp")).write_bytes(b"half")
            raise Killed

    monkeypatch.setattr(checkpoints.dcp, "save", killed)
    with pytest.raises(Killed):
        train(tmp_path / "run")
    monkeypatch.setattr(checkpoints.dcp, "save", save)
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoints.steps(folder) == [5, 10]
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    steps: list[int] = []
    load = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda *a: (steps.append(a[1]), load(*a)))
    assert train(tmp_path / "run", "--resume") == 0
    assert steps == [10]
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["step_000000025", "step_000000026"]
    assert train(tmp_path / "run", "--resume") == 0  # nothing is left to do
    assert steps == [10, 26]
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [7, EPOCH, 15])  # the last step of an epoch, and of those with a checkpoint
def test_a_signal_ends_it_after_the_step(tmp_path, at_step, capsys, number, step):
    handlers = [signal.getsignal(n) for n in training.SIGNALS]
    at_step(step, lambda: os.kill(os.getpid(), number))
    assert train(tmp_path / "run", "--workers", "1") == 128 + number
    text = f"train: stopped by {number.name}; --resume goes on from the last checkpoint\n"
    assert capsys.readouterr().err.endswith(text)
    assert [signal.getsignal(n) for n in training.SIGNALS] == handlers
    assert checkpoints.steps(tmp_path / "run" / "checkpoints")[-1] == step
    assert kinds(tmp_path / "run") == WHOLE[: WHOLE.index(("step", step + 1))]
    assert train(tmp_path / "run", "--workers", "1", "--resume") == 0
    assert kinds(tmp_path / "run") == WHOLE


def test_a_signal_in_the_last_step_is_too_late(tmp_path, at_step):
    at_step(2 * EPOCH, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(tmp_path / "run") == 0
    assert (tmp_path / "run" / "network.pt").exists()


def test_a_second_ctrl_c_does_not_wait(tmp_path, at_step, capsys):
    def twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    at_step(7, twice)
    assert train(tmp_path / "run", "--workers", "1") == 128 + signal.SIGINT
    assert "train: stopped by SIGINT" in capsys.readouterr().err
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [5]


def test_tensorboard_has_the_same(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra train")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path / "run", "--tensorboard", "--epochs", "1") == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [line["loss"] for line in records(tmp_path / "run") if line["kind"] == "step"]
    assert [event.value for event in events.Scalars("step/loss")] == losses
    assert [event.step for event in events.Scalars("evaluation/recall_at_1")] == [0, EPOCH]


# ---- data --------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four classes of six pictures, each of a hue; and what is no picture."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for name, color in {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "grey": (1, 1, 1)}.items():
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(6):
            noise = generator.integers(100, 256, (24, 20 + i, 1)) * np.array(color)
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.{'png' if i % 2 else 'JPG'}")
        (folder / "notes.txt").write_text("no picture")
    (tmp_path / "photos" / ".cache").mkdir()
    return tmp_path / "photos"


def test_a_folder_of_images(tmp_path, photos):
    arguments = ["--data", str(photos), "--image-size", "16", "--classes", "4", "--samples", "2"]
    arguments += ["--held-out", "0.4", "--augment"]
    assert train(tmp_path / "run", *arguments, "--epochs", "4", "--workers", "2") == 0
    assert [record["recall_at_1"] for record in records(tmp_path / "run") if "recall_at_1" in record][-1] == 1
    (photos / "red" / "0.JPG").rename(photos / "blue" / "9.jpg")
    assert train(tmp_path / "run", *arguments, "--epochs", "4", "--resume") == 2  # it is not the same data


@pytest.mark.parametrize(("amp", "loss"), [("bfloat16", "batch_hard"), ("float16", "batch_all")])
def test_autocast_and_its_scale_go_on_too(tmp_path, photos, monkeypatch, at_step, amp, loss):
    narrow = network.EmbeddingNetwork  # CPUs without instructions for halves are slow
    monkeypatch.setattr(
        network, "EmbeddingNetwork", lambda channels, _, size: narrow(channels, (8, 16), size)
    )
    arguments = ["--data", str(photos), "--image-size", "16", "--classes", "4", "--samples", "2"]
    arguments += ["--held-out", "0.4", "--amp", amp, "--loss", loss]
    assert train(tmp_path / "whole", *arguments, "--epochs", "5") == 0
    at_step(7, kill)
    with pytest.raises(Killed):
        train(tmp_path / "killed", *arguments, "--epochs", "5")
    assert train(tmp_path / "killed", *arguments, "--epochs", "5", "--resume") == 0
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    assert kinds(tmp_path / "whole")[-1] == ("evaluation", 10)


def test_images_are_their_middle_resized(photos):
    loaded = data.load(str(photos), 16)
    assert loaded.classes == ["blue", "green", "grey", "red"] and loaded.shape == (3, 16, 16)
    assert loaded.labels.bincount().tolist() == [6] * 4
    image, label = loaded.images[21]  # red/3.png, 24 x 23
    assert image.shape == (3, 16, 16) and label == 3
    assert image[0].min() > 0.3 and image[1:].max() == 0
    square = data.load(str(photos), 23).images[21][0]
    picture = data.read_picture(photos / "red" / "3.png")
    assert torch.equal(square, picture[:, :23])  # (24 - 23) // 2 rows are cut off at the top


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.floats(0, 0.99), st.integers(0, 9))
def test_what_is_held_out(sizes, fraction, seed):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    trained, held_out = data.split(labels, fraction, seed)
    assert sorted([*trained.tolist(), *held_out.tolist()]) == [*range(len(labels))]
    counts = labels[held_out].bincount(minlength=len(sizes)).tolist()
    for size, count in zip(sizes, counts, strict=True):
        if fraction == 0 or size < 4:
            assert count == 0
        else:
            assert count == min(max(2, round(fraction * size)), size - 2)


def test_augmentation():
    images = torch.rand(5, 3, 16, 16)
    none = torch.full((5, 4), 0.5)
    torch.testing.assert_close(data.augmented(images, none), images)
    shifted = none.clone()
    shifted[2, 2] = 1.0  # by a tenth of the width, 1.6 pixels
    result = data.augmented(images, shifted)
    torch.testing.assert_close(result[[0, 1, 3, 4]], images[[0, 1, 3, 4]])
    expected = 0.4 * images[2, :, :, 1:15] + 0.6 * images[2, :, :, 2:]
    torch.testing.assert_close(result[2, :, :, :14], expected, rtol=1e-4, atol=1e-5)
    angled = none.clone()
    angled[:, :2] = torch.rand(5, 2)
    assert ((data.augmented(images, angled) - images).abs().mean(dim=(1, 2, 3)) > 0.01).all()


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--classes", "11"], "--classes 11: digits has only 10"),
        (["--data", "nowhere"], "--data: nowhere: no such folder"),
        (["--data", "{photos}/red"], "expected a subfolder of images for each class, got none"),
        (["--data", "{photos}", "--held-out", "0"], "each class needs 2 images; lone has 1"),
        (["--out", "{photos}/red/1.png"], "File exists: '{photos}/red/1.png'"),
        (["--device", "cuda"], "--device cuda: 1 processes on a machine with 0 CUDA devices"),
    ],
)
def test_errors(tmp_path, photos, monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (photos / "lone").mkdir()
    (photos / "red" / "0.JPG").rename(photos / "lone" / "0.jpg")
    arguments = [argument.format(photos=photos) for argument in arguments]
    assert main([*ARGUMENTS, "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train: ") and error.count("\n") == 1
    assert text.format(photos=photos) in error
    assert not (tmp_path / "run").exists()


def test_too_few_images_to_hold_any_out(tmp_path, photos, capsys):
    for image in photos.glob("*/[3-5].*"):
        image.unlink()
    arguments = ["--data", str(photos), "--classes", "4"]
    assert train(tmp_path / "run", *arguments) == 2
    assert "--held-out 0.8: no class has the 4 images that this takes; give 0" in capsys.readouterr().err
    arguments += ["--held-out", "0", "--epochs", "1"]
    assert train(tmp_path / "run", *arguments) == 0
    assert {kind for kind, _ in kinds(tmp_path / "run")} == {"step"}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--classes", "1", "an integer >= 2"),
        ("--samples", "1", "an integer >= 2"),
        ("--samples", "2.5", "an integer >= 2"),
        ("--image-size", "15", "an integer >= 16"),
        ("--held-out", "1", "in [0, 1)"),
        ("--held-out", "nan", "in [0, 1)"),
        ("--lr", "0", "a finite number > 0"),
        ("--margin", "inf", "a finite number >= 0"),
        ("--workers", "-1", "an integer >= 0"),
        ("--seed", str(2**63), "an integer from 0 to 2**63 - 1"),
    ],
)
def test_errors_of_options(tmp_path, capsys, option, value, expected):
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "run", option, value)
    assert caught.value.code == 2
    assert f"argument {option}: must be {expected}, got '{value}'\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_nor_another_resumed(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out, "--epochs", "1") == 0
    before = (out / "log.jsonl").read_bytes()
    assert train(out, "--epochs", "1") == 2
    assert capsys.readouterr().err.endswith(
        f"train: --out {out}: there is a run in it; --resume goes on with it\n"
    )
    assert train(out, "--epochs", "1", "--resume", "--lr", "0.01") == 2
    assert capsys.readouterr().err == f"train: --lr 0.01: the run in {out} has 0.001\n"
    assert train(out, "--resume") == 2
    assert capsys.readouterr().err == f"train: --epochs 2: the run in {out} has 1\n"
    assert (out / "log.jsonl").read_bytes() == before


def test_missing_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(tmp_path / "run", "--tensorboard") == 1
    text = 'train: tensorboard not installed; pip install "deepsim-ext[train]"\n'
    assert capsys.readouterr().err == text
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else find_spec(name))
    assert train(tmp_path / "run") == 1
    assert capsys.readouterr().err == 'train: tqdm not installed; pip install "deepsim-ext[train]"\n'
    assert not (tmp_path / "run").exists()


# ---- several processes -------------------------------------------------------------------------------------


def start(count: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The command in as many processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "deepsim_ext.examples.train", *ARGUMENTS, "--classes", "6", *arguments],
            env=os.environ | {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit codes and what was written to stderr."""
    try:
        texts = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def wait_for(out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or f'"step": {step},' not in (out / "log.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_three_processes_killed_and_resumed_have_the_same_curve(tmp_path):
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    assert [code for code, _ in ends(start(3, "--out", str(whole)))] == [0, 0, 0]
    processes = start(3, "--out", str(killed))
    wait_for(killed, 8)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [code for code, _ in ends(processes)] == [-signal.SIGKILL] * 3
    assert records(killed) != records(whole)
    assert not (killed / "network.pt").exists()
    assert [code for code, _ in ends(start(3, "--out", str(killed), "--resume"))] == [0, 0, 0]
    assert records(killed) == records(whole)
    # And one process has the curve of three, but for rounding.
    assert train(alone, "--classes", "6") == 0
    for one, three in zip(records(alone), records(whole), strict=True):
        if one["kind"] == "step" and one["step"] <= 10:
            assert one["loss"] == pytest.approx(three["loss"], rel=1e-3)
            assert one["mean_d_an"] == pytest.approx(three["mean_d_an"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGTERM, [0, 1]), (signal.SIGINT, [0, 1]), (signal.SIGTERM, [1])]
)
def test_two_processes_and_their_workers_end_by_a_signal(tmp_path, number, ranks):
    """Which workers get too, as from a terminal; after the same step, even if but one of them gets it."""
    out = tmp_path / "run"
    processes = start(2, "--out", str(out), "--epochs", "50", "--workers", "1")
    wait_for(out, 12)
    for rank in ranks:
        os.killpg(processes[rank].pid, number)
    (code, text), (other, other_text) = ends(processes)
    assert (code, other) == (128 + number, 128 + number), text + other_text
    assert f"train: stopped by {number.name}; --resume goes on from the last checkpoint\n" in text
    assert "Traceback" not in text + other_text
    assert checkpoints.steps(out / "checkpoints")[-1] == records(out)[-1]["step"] >= 12


@pytest.mark.slow
def test_all_processes_refuse_the_same(tmp_path):
    expected = (2, "train: --classes 5: must be a multiple of the 2 processes\n")
    assert ends(start(2, "--out", str(tmp_path / "run"), "--classes", "5")) == [expected] * 2
