"""Arrays from .npy files, mapped and not read; nothing in a file is ever executed."""

from __future__ import annotations

import warnings
import zipfile
from os import PathLike

import numpy as np

from ._checks.texts import error
from ._checks.verification import ARRAY_FLOATS, describe_array


def map_npy(function: str, path: str | PathLike[str]) -> np.memmap:
    """The array in a .npy file, read-only and on disk.

    Mapping finds a file that is shorter than its header says before memory is allocated for it.

    Raises:
        ValueError: the file cannot be read, is none, is broken or holds Python objects.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser says of a damaged header
            return np.lib.format.open_memmap(path, mode="r")
    except Exception as problem:  # broken files come with errors of every kind
        got = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        got = (got.splitlines() or [type(problem).__name__])[0]
        if not isinstance(problem, OSError) and zipfile.is_zipfile(path):
            got = "a .npz file"
        raise error(ValueError, function, str(path), "a .npy file", got) from None


def map_embeddings(function: str, path: str | PathLike[str]) -> np.memmap:
    """`map_npy` of `is_embeddings`, or ValueError."""
    array = map_npy(function, path)
    if not is_embeddings(array):
        expected = "float16, float32 or float64 of shape [N, D] with D >= 1"
        raise error(ValueError, function, str(path), expected, describe_array(array))
    return array


def is_embeddings(array: np.ndarray) -> bool:
    """Float16, float32 or float64, of any byte order, and of shape [N, D] with D >= 1."""
    return array.dtype.newbyteorder("=") in ARRAY_FLOATS and array.ndim == 2 and array.shape[1] > 0


def in_memory(array: np.ndarray) -> np.ndarray:
    """A copy that torch takes: of this machine's byte order, rows adjacent."""
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
