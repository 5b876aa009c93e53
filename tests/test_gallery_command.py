"""The commands `enroll` and `identify`, as a terminal sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from deepsim_ext import cli
from deepsim_ext.recognition import Gallery, command, storage

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with embeddings of four people, a, b, a and c, in which commands run."""
    monkeypatch.chdir(tmp_path)
    np.save("e.npy", np.array([[0, 0], [10, 0], [0, 1], [20, 0]], dtype=np.float32))
    Path("names.txt").write_text("a\nb\na\nc\n")
    np.save("q.npy", np.array([[0, 2], [12, 0], [50, 0]], dtype=np.float32))
    return tmp_path


def enroll(*arguments: str) -> int:
    return cli.main(["enroll", "gallery", *arguments])


def identify(*arguments: str) -> int:
    return cli.main(["identify", "gallery", *arguments])


def enrolled(*arguments: str) -> None:
    assert enroll("--embeddings", "e.npy", "--identities", "names.txt", *arguments) == 0


def contents() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def line(capsys) -> str:
    """The one line of an error, with nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n"), (out, err)
    return err[:-1]


# ---- what they do ------------------------------------------------------------------------------------------


def test_enroll_and_identify(here, capsys):
    enrolled("--threshold", "5")
    assert capsys.readouterr().out == "gallery: 3 identities, 4 templates\n"
    assert identify("--embeddings", "q.npy") == 0
    assert capsys.readouterr().out == '0: "a" 1\n1: "b" 2\n2: unknown ("c") 30\n'
    assert identify("--embeddings", "q.npy", "-k", "4", "--threshold", "11", "--output", "out.json") == 0
    assert capsys.readouterr().out.splitlines() == [
        '0: "a" 1, "b" 10.198, unknown ("c") 20.0998',
        '1: "b" 2, "c" 8, unknown ("a") 12',
        '2: unknown ("c") 30, unknown ("b") 40, unknown ("a") 50',
    ]
    content = json.loads(Path("out.json").read_text())
    assert (content["distance"], content["threshold"]) == ("euclidean", 11)
    assert [[c["identity"] for c in row] for row in content["queries"]] == [
        ["a", "b", None],
        ["b", "c", None],
        [None, None, None],
    ]
    assert content["queries"][1][1] == {"identity": "c", "nearest": "c", "distance": 8}
    assert content["queries"][1][2] == {"identity": None, "nearest": "a", "distance": 12}
    assert Gallery.load("gallery").threshold == 5  # that of identify was for once


def test_more_of_the_same_others_and_less(here, capsys):
    enrolled("--distance", "cosine")
    Path("more.txt").write_bytes("﻿b\r\nåsa\r\na\r\na".encode())
    assert enroll("--embeddings", "e.npy", "--identities", "more.txt", "--remove", "a", "c") == 0
    gallery = Gallery.load("gallery")
    assert gallery.identities == ["b", "åsa", "a"] and gallery.distance == "cosine"
    assert gallery.templates("b").tolist() == [[10, 0], [0, 0]]
    assert gallery.templates("a").tolist() == [[0, 1], [20, 0]]
    assert enroll("--threshold", "0.25") == 0
    assert Gallery.load("gallery").threshold == 0.25
    assert enroll("--remove", "b", "åsa", "a") == 0
    assert capsys.readouterr().out.endswith("gallery: 0 identities, 0 templates\n")
    assert identify("--embeddings", "q.npy") == 0
    assert capsys.readouterr().out == "0: unknown\n1: unknown\n2: unknown\n"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_dtypes_of_files(here, capsys, dtype):
    np.save("e.npy", np.asfortranarray(np.load("e.npy").astype(dtype)))
    enrolled()
    gallery = Gallery.load("gallery")
    assert gallery.dtype is torch.float32
    assert gallery.templates("a").tolist() == [[0, 0], [0, 1]]
    enrolled()
    capsys.readouterr()
    assert identify("--embeddings", "e.npy") == 0
    assert capsys.readouterr().out == '0: "a" 0\n1: "b" 0\n2: "a" 0\n3: "c" 0\n'


def test_a_gallery_of_float64_stays_one(here):
    gallery = Gallery(2, dtype=torch.float64)
    gallery.enroll("a", torch.full((1, 2), 0.1, dtype=torch.float64))
    gallery.save("gallery")
    enrolled()
    gallery = Gallery.load("gallery")
    assert gallery.dtype is torch.float64
    assert gallery.templates("a").tolist() == [[0.1, 0.1], [0, 0], [0, 1]]


def test_what_is_printed_is_described(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["identify", "--help"])
    said = capsys.readouterr().out
    assert '    0: "ada" 0.31, unknown ("bob") 1.2\n' in said and "float64 is read as float32" in said


def test_names_are_shown_so_that_a_terminal_is_safe(here, capsys):
    Path("names.txt").write_text('\x1b[31mred\nå\n"\nc\n')
    enrolled()
    capsys.readouterr()
    assert identify("--embeddings", "e.npy") == 0
    assert capsys.readouterr().out.splitlines() == [
        '0: "\\u001b[31mred" 0',
        '1: "å" 0',
        '2: "\\"" 0',
        '3: "c" 0',
    ]


def test_as_a_process(here):
    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deepsim_ext", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here)

    done = python("enroll", "gallery", "--embeddings", "e.npy", "--identities", "names.txt")
    assert (done.returncode, done.stdout, done.stderr) == (0, "gallery: 3 identities, 4 templates\n", "")
    done = python("identify", "gallery", "--embeddings", "nothing.npy")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "identify: nothing.npy must be a .npy file, got No such file or directory\n"


def test_the_command_line_imports_none_of_the_extras():
    code = (
        "import sys, deepsim_ext.cli, deepsim_ext.evaluation, deepsim_ext.recognition;"
        "print([m for m in ('faiss', 'sklearn', 'safetensors', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_enrolments_at_the_same_time_wait_for_each_other(here, monkeypatch):
    enrolled()
    inside, write = threading.Event(), storage.write

    def slow_write(*arguments: object) -> None:
        if not inside.is_set():
            inside.set()
            second.join(timeout=0.5)  # it would have read the old gallery by then
        write(*arguments)

    monkeypatch.setattr(storage, "write", slow_write)
    first = threading.Thread(target=enroll, args=["--remove", "a"])
    second = threading.Thread(target=lambda: inside.wait() and enroll("--remove", "b"))
    second.start()
    first.start()
    first.join()
    second.join()
    assert Gallery.load("gallery").identities == ["c"]


# ---- what they do not do -----------------------------------------------------------------------------------


NEW = ("--embeddings", "e.npy", "--identities", "names.txt")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "nothing to do: give --embeddings and --identities, --remove or --threshold"),
        (("--embeddings", "e.npy"), "--embeddings and --identities go together"),
        (("--identities", "names.txt"), "--embeddings and --identities go together"),
        (("--remove", "nobody"), 'remove: identity must be in the gallery, got "nobody"'),
        (("--remove", "a", "a"), 'remove: identity must be in the gallery, got "a"'),
        ((*NEW, "--remove", "nobody"), 'remove: identity must be in the gallery, got "nobody"'),
        ((*NEW, "--distance", "cosine"), "--distance cosine: the gallery is one of euclidean distances"),
        ((*NEW, "--threshold", "nan"), "Gallery: threshold must be a finite number >= 0, got float nan"),
        (("--embeddings", "three.npy", *NEW[2:]), "names.txt: 4 names for 3 embeddings"),
        (
            ("--embeddings", "wide.npy", *NEW[2:]),
            "embeddings must be float32 or bfloat16 or float16 of shape",
        ),
        (
            ("--embeddings", "nan.npy", *NEW[2:]),
            "embeddings must be finite, with rows shorter than 1e+18, got a NaN",
        ),
        ((*NEW[:3], "gap.txt"), "gap.txt: line 2 is empty"),
        ((*NEW[:3], "latin.txt"), "latin.txt: no UTF-8 text: "),
        ((*NEW[:3], "missing.txt"), "[Errno 2] No such file or directory: 'missing.txt'"),
        (("--embeddings", "pickle.npy", *NEW[2:]), "pickle.npy must be a .npy file, got "),
        (("--embeddings", "cut.npy", *NEW[2:]), "cut.npy must be a .npy file, got "),
        (("--embeddings", "empty.npy", *NEW[2:]), "empty.npy must be a .npy file, got "),
        (("--embeddings", "names.txt", *NEW[2:]), "names.txt must be a .npy file, got "),
        (
            ("--embeddings", "integers.npy", *NEW[2:]),
            "integers.npy must be float16, float32 or float64 of shape [N, D] with D >= 1, got int64 [4, 2]",
        ),
        (
            ("--embeddings", "flat.npy", *NEW[2:]),
            "flat.npy must be float16, float32 or float64 of shape [N, D] with D >= 1, got",
        ),
        (("--embeddings", "archive.npz", *NEW[2:]), "archive.npz must be a .npy file, got a .npz file"),
    ],
)
def test_a_failing_enroll_leaves_the_old_gallery(here, capsys, arguments, text):
    enrolled()
    good = np.load("e.npy")
    np.save("three.npy", good[:3])
    np.save("wide.npy", np.zeros((4, 3), dtype=np.float32))
    np.save("nan.npy", np.full((4, 2), np.nan, dtype=np.float32))
    np.save("integers.npy", good.astype(np.int64))
    np.save("flat.npy", good.ravel())
    np.savez("archive.npz", good)
    np.save("pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("e.npy").read_bytes()[:-4])
    Path("empty.npy").touch()
    Path("gap.txt").write_text("a\n\nb\nc\n")
    Path("latin.txt").write_bytes(b"a\nb\n\xe5\nc\n")
    before = contents()
    capsys.readouterr()
    assert enroll(*arguments) == 2
    said = line(capsys)
    assert said.startswith(f"enroll: {text}") and "allow_pickle" not in said, said
    assert contents() == before


@pytest.mark.parametrize("arguments", [("--remove", "a"), ("--threshold", "1"), (*NEW, "--remove", "a")])
def test_a_failing_enroll_makes_no_folder(here, capsys, arguments):
    before = contents()
    assert enroll(*arguments) == 2
    assert "gallery" in line(capsys)
    assert contents() == before and not Path("gallery").exists()
    assert cli.main(["enroll", "no/parents", *NEW]) == 2
    assert line(capsys) == "enroll: [Errno 2] No such file or directory: 'no/parents'"
    assert cli.main(["enroll", "e.npy", *NEW]) == 2
    assert line(capsys) == "enroll: [Errno 17] File exists: 'e.npy'"


def test_a_full_disk(here, capsys, monkeypatch):
    enrolled()
    before = contents()
    capsys.readouterr()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    assert enroll("--remove", "a") == 2
    assert line(capsys) == "enroll: [Errno 28] No space left on device"
    assert identify("--embeddings", "q.npy", "--output", "out.json") == 2
    assert line(capsys) == "identify: [Errno 28] No space left on device"
    assert contents() == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--embeddings", "q.npy", "-k", "0"), "search: k must be an integer >= 1, got int 0"),
        (("--embeddings", "q.npy", "--threshold", "-1"), "Gallery: threshold must be a finite number >= 0"),
        (
            ("--embeddings", "wide.npy"),
            "search: queries must be float32 or bfloat16 or float16 of shape [Q, D]=[Q, 2]",
        ),
        (("--embeddings", "q.npy", "--output", "no/folder.json"), "[Errno 2] No such file or directory"),
    ],
)
def test_a_failing_identify_writes_nothing(here, capsys, arguments, text):
    enrolled()
    np.save("wide.npy", np.zeros((4, 3), dtype=np.float32))
    before = contents()
    capsys.readouterr()
    assert identify("--output", "out.json", *arguments) == 2
    assert line(capsys).startswith(f"identify: {text}")
    assert contents() == before


def test_no_gallery_and_a_broken_one(here, capsys):
    assert identify("--embeddings", "q.npy") == 2
    assert line(capsys) == "identify: gallery: no gallery there: gallery/gallery.json is missing"
    enrolled()
    capsys.readouterr()
    Path("gallery/gallery.json").write_text("{")
    for run in (identify, enroll):
        assert run(*NEW if run is enroll else NEW[:2]) == 2
        assert line(capsys).startswith(f"{run.__name__}: gallery/gallery.json: no JSON: ")
    assert Path("gallery/gallery.json").read_text() == "{"


def test_without_safetensors(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert enroll(*NEW) == 1
    assert line(capsys) == "enroll: safetensors not installed; pip install deepsim-ext[gallery]"
    assert not Path("gallery").exists()
    assert identify("--embeddings", "q.npy") == 1
    assert line(capsys) == "identify: safetensors not installed; pip install deepsim-ext[gallery]"


def test_out_of_memory_is_one_line(here, capsys, monkeypatch):
    enrolled()
    capsys.readouterr()

    def too_much(*arguments: object, **options: object) -> None:
        raise MemoryError

    def too_much_for_torch(*arguments: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(Gallery, "search", too_much_for_torch)
    assert identify("--embeddings", "q.npy") == 2
    assert line(capsys) == "identify: not enough memory"
    monkeypatch.setattr(command, "in_memory", too_much)
    assert identify("--embeddings", "q.npy") == 2
    assert line(capsys) == "identify: MemoryError"
