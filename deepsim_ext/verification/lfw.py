"""The pairs files of Labeled Faces in the Wild, and the images that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .._checks.texts import error
from .files import _shown
from .results import LfwPairs

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
NAMED = 3  # missing files that an error names


def read_lfw_pairs(path: str | Path) -> LfwPairs:
    """The pairs of `pairs.txt`, `pairsDevTrain.txt` or a file of their form.

    The first line has the number of folds F and of same pairs in each, n, or n alone for one fold. Then come,
    fold by fold, n lines `name number number` of same pairs and n lines `name number name number` of
    different ones, fields apart by tabs or spaces. A number is the image's, from 1.

    Source: the README of LFW's pairs files, http://vis-www.cs.umass.edu/lfw/README.txt.

    Returns:
        `LfwPairs`: images, each once, and pairs of them in the order of the file, which is that of the folds.

    Raises:
        ValueError: the file cannot be read, or a line, which is named, is not as said above.
    """
    function = "read_lfw_pairs"
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        got = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise error(ValueError, function, str(path), "a readable text file", got) from None

    def wrong(number: int, expected: str) -> ValueError:
        return error(ValueError, function, f"{path}, line {number},", expected, _shown(lines[number - 1]))

    header = lines[0].split()
    if len(header) not in (1, 2) or not all(map(_is_number, header)):
        raise wrong(1, "the number of folds and of pairs per fold, or of pairs alone")
    folds, per_fold = (1, int(header[0])) if len(header) == 1 else map(int, header)
    count = 2 * folds * per_fold
    if len(lines) - 1 != count:
        expected = f"of {count} pairs, as its first line says"
        raise error(ValueError, function, str(path), expected, f"{len(lines) - 1} lines after it")

    indices: dict[tuple[str, int], int] = {}
    pairs = np.empty((count, 2), np.int64)
    same = np.arange(count) // per_fold % 2 == 0
    for row, line in enumerate(lines[1:]):
        fields = line.split()
        if same[row]:
            if len(fields) != 3 or not _are_images(fields[:1], fields[1:]):
                raise wrong(row + 2, "a name and two numbers, for a same pair")
            pair = (fields[0], int(fields[1])), (fields[0], int(fields[2]))
        else:
            if len(fields) != 4 or not _are_images(fields[::2], fields[1::2]) or fields[0] == fields[2]:
                raise wrong(row + 2, "a name and a number, twice and of two names, for a different pair")
            pair = (fields[0], int(fields[1])), (fields[2], int(fields[3]))
        pairs[row] = [indices.setdefault(image, len(indices)) for image in pair]
    return LfwPairs(list(indices), pairs, same, folds)


def lfw_files(images: Sequence[tuple[str, int]], root: str | Path) -> list[Path]:
    """The file of each image: `<root>/<name>/<name>_0001.jpg`, or with .jpeg, .png, .bmp or .webp.

    Args:
        images: names and numbers, as `read_lfw_pairs` returns them.
        root: the folder that has a folder for each name.

    Raises:
        ValueError: root is no folder, or files are missing: how many and the first of them.
    """
    root = Path(root)
    if not root.is_dir():
        raise error(ValueError, "lfw_files", "root", "a folder", str(root))
    files, missing = [], []
    for name, number in images:
        stem = root / name / f"{name}_{number:04d}"
        found = next((p for e in EXTENSIONS if (p := stem.with_name(stem.name + e)).is_file()), None)
        if found is None:
            missing.append(f"{stem}{EXTENSIONS[0]}")
        else:
            files.append(found)
    if missing:
        expected = f"a folder with all of {len(images)} images"
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise error(ValueError, "lfw_files", "root", expected, f"no {', '.join(missing[:NAMED])}{more}")
    return files


def _is_number(field: str) -> bool:
    return field.isascii() and field.isdigit() and len(field) <= 9 and int(field) > 0


def _are_images(names: list[str], numbers: list[str]) -> bool:
    """A name is that of a folder: no way out of the root."""
    return all(map(_is_number, numbers)) and all(
        name not in (".", "..") and not set(name) & set("/\\\0") for name in names
    )
