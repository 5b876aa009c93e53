"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_beside(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under another name and renames it, both of them down to the disk.

    Whoever reads `path`, after a crash too, finds the old file or the new one.
    """
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # of a crash; or a link, which is not to be followed
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
