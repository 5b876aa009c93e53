"""Embeddings, labels and pairs from files: .npy and .csv. Nothing in a file is ever executed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from .._checks import pairs as checks
from .._checks.texts import error
from .._checks.verification import describe_array
from .._npy import in_memory, map_embeddings, map_npy
from .results import LabelledPairs

MAPPED_FROM = 2**28  # bytes: a larger file stays on disk
HEADER = ["first", "second", "same"]
DIGITS = 18  # of an index, within int64


def load_embeddings(path: str | Path) -> np.ndarray:
    """Embeddings [N, D] from a .npy file; one larger than 256 MB is mapped, not read.

    Raises:
        ValueError: the file is none, is broken, or holds anything else than float16, float32 or float64 of
            shape [N, D] with N, D >= 1.
    """
    return _load("load_embeddings", path, map_embeddings("load_embeddings", path))


def load_labels(path: str | Path) -> np.ndarray:
    """Labels, int64 [N], from a .npy file of integers.

    Raises:
        ValueError: the file is none, is broken, or holds anything else than integers of shape [N], N >= 1.
    """
    array = _load("load_labels", path, map_npy("load_labels", path))
    try:
        return checks.labels_array("load_labels", array)
    except (TypeError, ValueError):
        expected = "integers of shape [N]"
        raise error(ValueError, "load_labels", str(path), expected, describe_array(array)) from None


def read_pairs(path: str | Path) -> LabelledPairs:
    """Pairs from a .csv file: two indices of rows, from 0, and 1 for the same or 0 for different.

    The columns are first, second, same; a first line with these names may be there or not, and so may the
    mark that Excel puts before UTF-8.

    Raises:
        ValueError: the file cannot be read, has no pair or a line that is none, which is named.
    """
    pairs, same = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, line in enumerate(csv.reader(file, strict=True), 1):
                fields = [field.strip() for field in line]
                if number == 1 and fields == HEADER:
                    continue
                if not _is_pair(fields):
                    where, expected = f"{path}, line {number},", "two indices and 0 or 1"
                    raise error(ValueError, "read_pairs", where, expected, _shown(",".join(line)))
                pairs.append((int(fields[0]), int(fields[1])))
                same.append(fields[2] == "1")
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        got = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise error(ValueError, "read_pairs", str(path), "a readable .csv file", got) from None
    if not pairs:
        raise error(ValueError, "read_pairs", str(path), "of at least one pair", "none")
    return LabelledPairs(np.array(pairs, np.int64), np.array(same))


def _is_pair(fields: list[str]) -> bool:
    return (
        len(fields) == 3
        and all(field.isascii() and field.isdigit() and len(field) <= DIGITS for field in fields[:2])
        and fields[2] in ("0", "1")
    )


def _shown(text: str) -> str:
    """The start of a line of a file, for an error."""
    return repr(text if len(text) <= 60 else f"{text[:60]}…")


def _load(function: str, path: str | Path, array: np.memmap) -> np.ndarray:
    """A mapped array of at least one number, in memory unless it is large."""
    if not array.size:
        raise error(ValueError, function, str(path), "of one number at least", describe_array(array))
    return array if array.nbytes > MAPPED_FROM and array.dtype.isnative else in_memory(array)
