"""Rows of an array that stays on disk: read chunk by chunk, and let go of again."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks.texts import describe, error
from ._checks.verification import describe_array
from ._nearest_rows import check_comparable
from ._npy import is_embeddings, map_embeddings
from ._on_disk import OnDisk

Source = str | PathLike[str] | np.ndarray

CHUNK_BYTES = 2**23  # of rows as they are computed with; a search holds a packed copy beside them
SCATTERED_ROWS = 16  # read at a time: around each of them the system may map a MiB


class MappedRows:
    """Float16, float32 or float64 rows [N, D]: a `RowSource` that reads `chunk_rows` at a time, or 8 MiB."""

    def __init__(self, function: str, argument: str, source: Source) -> None:
        if isinstance(source, str | PathLike):
            array = map_embeddings(function, source)
        elif isinstance(source, np.ndarray):
            array = source
        else:
            expected = "a NumPy array, mapped or not, or the path of a .npy file"
            raise error(TypeError, function, argument, expected, describe(source))
        if not is_embeddings(array) or not array.flags.c_contiguous:
            order = "" if array.flags.c_contiguous else " of another order in memory"
            expected = "float16, float32 or float64 of shape [N, D] with D >= 1, in C order"
            kind = ValueError if array.dtype.kind == "f" else TypeError
            raise error(kind, function, argument, expected, describe_array(array) + order)
        self.function, self.argument, self.array = function, argument, array
        self.dtype = torch.float64 if array.dtype.itemsize == 8 else torch.float32
        self.device = torch.device("cpu")
        self.chunk_rows = 1
        self._map = _map_under(array)

    def become(self, dtype: torch.dtype, device: torch.device, chunk_rows: int | None) -> None:
        self.dtype, self.device = dtype, device
        self.chunk_rows = chunk_rows or max(1, CHUNK_BYTES // (self.array.shape[1] * dtype.itemsize))

    def read_all(self) -> None:
        for _ in self.chunks():
            pass

    def references(self, labels: Tensor | None, distance: str, first: int = 0) -> OnDisk:
        return OnDisk(self.chunks, labels, distance, first)

    def stand_in(self, companion: Any, dtype: torch.dtype) -> Tensor:
        """Of the same shape, in next to no memory."""
        device = companion.device if isinstance(companion, Tensor) else self.device
        return torch.empty(1, 1, dtype=dtype, device=device).expand(self.array.shape)

    def __len__(self) -> int:
        return len(self.array)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Index of the first row, and rows, in order; ValueError for one that is not comparable."""
        for first in range(0, len(self), self.chunk_rows):
            rows = self._read(slice(first, first + self.chunk_rows))
            check_comparable(self.function, self.argument, rows, first)
            yield first, rows

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows of these indices."""
        parts = rows.cpu().split(SCATTERED_ROWS)
        return torch.cat([self._read(part.numpy()) for part in parts])

    def _read(self, rows: slice | np.ndarray) -> Tensor:
        # NumPy converts while it copies, from any byte order.
        read = torch.from_numpy(self.array[rows].astype(str(self.dtype).removeprefix("torch.")))
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)  # the pages stay in the cache of the system
        return read.to(self.device)


def _map_under(array: Any) -> mmap.mmap | None:
    """The mapping of a file that holds the array, if its pages can be let go of without a loss."""
    private = getattr(array, "mode", None) == "c"  # changes that no file has
    while isinstance(array, np.ndarray):
        array = array.base
    letting_go = isinstance(array, mmap.mmap) and not private and hasattr(mmap, "MADV_DONTNEED")
    return array if letting_go else None
