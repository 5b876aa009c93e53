"""A gallery in a folder: `gallery.json`, and the templates as `embeddings-<hash>.safetensors`.

The JSON names the templates by the SHA-256 of their file and is replaced last, in one step: a crash at any
moment leaves the old gallery or the new one. One process writes at a time; `locked` makes others wait. Files
are read as data from anyone: sizes are compared before memory is taken for them, and nothing leads out of the
folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import recognition as checks
from .._checks.options import DISTANCES, is_number
from .._files import write_beside
from .._nearest_rows import check_comparable

FORMAT, VERSION = "deepsim_ext gallery", 1
JSON_NAME, JSON_LIMIT = "gallery.json", 2**30  # bytes
OWN_NAME = re.compile(r"embeddings-[0-9a-f]{64}\.safetensors|\.embeddings-[0-9a-f]{64}\.safetensors\.part")
HEADER_LIMIT = 4096  # bytes of a file of templates beside the templates
DTYPES = {"float32": torch.float32, "float64": torch.float64}
KEYS = {
    "format": str,
    "version": int,
    "embedding_size": int,
    "dtype": str,
    "distance": str,
    "threshold": float | int | None,
    "identities": list,
    "counts": list,
    "sha256": str,
}


class Stored(NamedTuple):
    """What is in the folder."""

    templates: Tensor  # [T, D], in order of identities
    identities: list[str]
    counts: list[int]  # templates of each
    distance: str
    threshold: float | None


def write(folder: str | PathLike[str], stored: Stored) -> None:
    """Puts a gallery into a folder, in place of the one there; makes the folder, but not its parents."""
    folder = Path(folder)
    data = _safetensors().save({"templates": stored.templates.contiguous()})
    sha256 = hashlib.sha256(data).hexdigest()
    content = {
        "format": FORMAT,
        "version": VERSION,
        "embedding_size": stored.templates.shape[1],
        "dtype": str(stored.templates.dtype).removeprefix("torch."),
        "distance": stored.distance,
        "threshold": stored.threshold,
        "identities": stored.identities,
        "counts": stored.counts,
        "sha256": sha256,
    }
    folder.mkdir(exist_ok=True)
    embeddings = _embeddings_path(folder, sha256)
    write_beside(embeddings, lambda file: file.write(data))
    write_beside(folder / JSON_NAME, lambda file: file.write(json.dumps(content).encode()))
    # What no gallery names any more: the one before, and what crashes left behind.
    for path in folder.iterdir():
        if OWN_NAME.fullmatch(path.name) and path != embeddings:
            with suppress(OSError):
                path.unlink()


def read(folder: str | PathLike[str]) -> Stored:
    """What `write` put there; ValueError for anything else, naming the file."""
    safetensors = _safetensors()
    folder = Path(folder)
    content = _content(folder / JSON_NAME)
    size, dtype = content["embedding_size"], DTYPES[content["dtype"]]
    rows = sum(content["counts"])
    path = _embeddings_path(folder, content["sha256"])
    expected = rows * size * dtype.itemsize
    try:
        data = _read(path, expected, expected + HEADER_LIMIT)
    except FileNotFoundError:
        if _content(folder / JSON_NAME) != content:  # a new gallery took the place of this one meanwhile
            return read(folder)
        raise ValueError(f"{path}: missing") from None
    if hashlib.sha256(data).hexdigest() != content["sha256"]:
        raise ValueError(f"{path}: not the file that {JSON_NAME} belongs to: its SHA-256 is another")
    try:
        tensors = safetensors.load(data)
    except Exception as problem:  # broken files come with errors of every kind
        raise ValueError(f"{path}: no safetensors file: {_line(problem)}") from None
    templates = tensors.get("templates")
    if len(tensors) != 1 or templates is None:
        raise ValueError(f'{path}: expected one tensor "templates", got {sorted(tensors)}')
    if templates.dtype is not dtype or list(templates.shape) != [rows, size]:
        raise ValueError(
            f"{path}: expected {content['dtype']} [{rows}, {size}], got"
            f" {str(templates.dtype).removeprefix('torch.')} {list(templates.shape)}"
        )
    check_comparable(str(path), "templates", templates)
    threshold = content["threshold"]
    return Stored(
        templates,
        content["identities"],
        content["counts"],
        content["distance"],
        None if threshold is None else float(threshold),
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits for others in this, then keeps them waiting: from reading a gallery to writing it back."""
    import fcntl  # not on Windows

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# ---- the JSON ----------------------------------------------------------------------------------------------


def _content(path: Path) -> dict[str, Any]:
    """The JSON, every value of which may be relied on."""

    def expect(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{path}: {what}")

    data = _read(path, 0, JSON_LIMIT)
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: no JSON: {_line(problem)}") from None
    expect(isinstance(content, dict) and content.get("format") == FORMAT, "not a gallery of deepsim_ext")
    expect(_is_integer(content.get("version")), "version must be an integer")
    expect(content["version"] == VERSION, f"of version {content['version']}, this is version {VERSION}")
    expect(content.keys() == KEYS.keys(), f"expected the keys {', '.join(KEYS)}")
    for key, kind in KEYS.items():
        value = content[key]
        good = isinstance(value, kind) and not isinstance(value, bool)
        expect(good, f"{key} must not be {type(value).__name__}")
    expect(content["embedding_size"] >= 1, "embedding_size must be >= 1")
    expect(content["dtype"] in DTYPES, f"dtype must be one of {', '.join(DTYPES)}")
    expect(content["distance"] in DISTANCES, f"distance must be one of {', '.join(DISTANCES)}")
    expect(bool(re.fullmatch("[0-9a-f]{64}", content["sha256"])), "sha256 must be 64 hexadecimal digits")
    identities, counts = content["identities"], content["counts"]
    expect(len(identities) == len(counts), f"{len(identities)} identities with {len(counts)} counts")
    expect(all(_is_integer(count) and count >= 1 for count in counts), "counts must be integers >= 1")
    try:
        for identity in identities:
            checks.identity_name("identities", identity)
        checks.threshold("gallery", content["threshold"])
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{path}: {problem}") from None
    expect(len(set(identities)) == len(identities), "an identity is there twice")
    return content


def _is_integer(value: Any) -> bool:
    return is_number(value) and isinstance(value, int)


# ---- files -------------------------------------------------------------------------------------------------


def _embeddings_path(folder: Path, sha256: str) -> Path:
    return folder / f"embeddings-{sha256}.safetensors"


def _read(path: Path, least: int, most: int) -> bytes:
    """A file of `least` to `most` bytes; no link, pipe or device."""
    try:
        # Not blocking: opening a pipe would wait for somebody to write.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as problem:
        link = path.is_symlink()
        raise ValueError(f"{path}: {'a link, not a file' if link else problem.strerror}") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise ValueError(f"{path}: not a regular file")
    with open(handle, "rb") as file:
        if not least <= status.st_size <= most:
            raise ValueError(f"{path}: {status.st_size} bytes, where there should be {least} to {most}")
        return file.read(most)


def _line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as problem:
        raise ImportError("safetensors not installed; pip install deepsim-ext[gallery]") from problem
    return safetensors.torch
