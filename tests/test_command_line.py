"""What all commands share: how they end at Ctrl-C, and where nobody reads what they print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deepsim_ext._command_line import ends_quietly
from deepsim_ext.stylize.pictures import write_picture

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "from deepsim_ext.examples import _runs; from sys import exit;"
EXAMPLE += "exit(_runs.main('name', 'A line.', lambda seed: {'all': _runs.Scores(0.5, 0.5)}, []))"


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with embeddings, labels, names and pictures."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    np.save(tmp_path / "labels.npy", np.arange(40) % 4)
    (tmp_path / "names.txt").write_text("".join(f"{i}\n" for i in range(40)))
    return tmp_path


def unread(folder: Path, *arguments: str, buffered: bool = True) -> tuple[int, str]:
    """Exit code and stderr of Python whose stdout nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "" if buffered else "1"}
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    return process.returncode, process.stderr


@pytest.mark.parametrize(
    ("arguments", "buffered"),
    [
        (["-m", "deepsim_ext", "info"], True),
        (["-m", "deepsim_ext", "info"], False),
        (["-m", "deepsim_ext", "stylize", "--help"], True),
        (["-m", "deepsim_ext.examples.train", "--help"], True),
        (["-m", "deepsim_ext.examples.fast_style", "--help"], True),
        (["-c", EXAMPLE], True),
        (["-c", EXAMPLE], False),
    ],
)
def test_without_a_reader_it_ends_quietly(here, arguments, buffered):
    assert unread(here, *arguments, buffered=buffered) == (141, "")


def test_without_a_reader_what_is_written_to_files_is_whole(here):
    pytest.importorskip("safetensors", reason="needs the extra gallery")
    pytest.importorskip("matplotlib", reason="needs the extras eval, profile and stylize")
    pytest.importorskip("tqdm", reason="needs the extras profile and stylize")
    pytest.importorskip("PIL", reason="needs the extra stylize")
    for i in range(2):
        write_picture(torch.rand(3, 20, 20), here / f"{i}.png")
    stylize = ["stylize", "0.png", "1.png", "--weights", "random", "--size", "16", "--steps", "2"]
    for line, file in (
        (["enroll", "people", "--embeddings", "x.npy", "--identities", "names.txt"], "people/gallery.json"),
        (["identify", "people", "--embeddings", "x.npy", "--output", "found.json"], "found.json"),
        (["verify", "--embeddings", "x.npy", "--labels", "labels.npy"], "verification/verify.json"),
        (
            ["profile-mining", "--rows", "64", "--dims", "8", "--seconds", "0.01"],
            "profile_mining/profile.json",
        ),
        ([*stylize, "--preset", "pytorch_tutorial", "--scales", "1", "-o", "out.png"], "out.png"),
    ):
        code, said = unread(here, "-m", "deepsim_ext", *line, buffered=False)
        # On a new machine matplotlib says that it looks for fonts.
        assert code == 141 and "Error" not in said and "Broken" not in said, line
        assert (here / file).stat().st_size > 100


def test_ctrl_c_is_a_line(capsys):
    @ends_quietly
    def main() -> int:
        print("so far", end="")
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr() == ("so far", "\ninterrupted\n")
