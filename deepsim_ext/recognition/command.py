"""The commands `enroll` and `identify` on a gallery in a folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .._checks.options import DISTANCES
from .._files import write_beside
from .._npy import in_memory, map_embeddings
from .gallery import Gallery
from .storage import JSON_NAME, locked

FILE = "floating point; float64 is read as float32"
PRINTED = """\
prints a line for every row of --embeddings, numbered from 0: the nearest identities and their distances,
nearest first,

    0: "ada" 0.31, unknown ("bob") 1.2

where unknown is what is not nearer than the threshold, whoever it is nearest to in parentheses. Names are
quoted as in JSON. --output writes the same as

    {"distance": "cosine", "threshold": 0.5, "queries": [[
        {"identity": "ada", "nearest": "ada", "distance": 0.31},
        {"identity": null, "nearest": "bob", "distance": 1.2}]]}
"""

Candidate = dict[str, str | float | None]


def add_enroll_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `enroll` to a parser."""
    parser.add_argument("gallery", type=Path, help="folder of the gallery; made if need be")
    parser.add_argument("--embeddings", type=Path, metavar="FILE.npy", help=f"[N, D], {FILE}")
    parser.add_argument("--identities", type=Path, metavar="FILE.txt", help="N names, one per line, UTF-8")
    parser.add_argument("--remove", nargs="+", default=[], metavar="NAME", help="before anybody is enrolled")
    parser.add_argument("--distance", choices=DISTANCES, help="of a new gallery (default: euclidean)")
    parser.add_argument("--threshold", type=float, help="the gallery's: farther queries are unknown")


def add_identify_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `identify` to a parser."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, PRINTED
    parser.add_argument("gallery", type=Path, help="folder of the gallery")
    parser.add_argument("--embeddings", type=Path, required=True, metavar="FILE.npy", help=f"[Q, D], {FILE}")
    parser.add_argument("-k", type=int, default=1, help="identities per query (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="default: the gallery's")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="see below")


def run_enroll(args: argparse.Namespace) -> int:
    """Enrolls and removes, or changes nothing: exit code 1 for a missing package, 2 for unusable input."""
    return _exit_code("enroll", _enroll, args)


def run_identify(args: argparse.Namespace) -> int:
    """Identifies; exit code 0, 1 for a missing package, 2 for unusable input."""
    return _exit_code("identify", _identify, args)


def _exit_code(name: str, run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    try:
        run(args)
    except BrokenPipeError:  # no input: for `ends_quietly`
        raise
    except (ImportError, TypeError, ValueError, OSError, MemoryError) as problem:
        print(f"{name}: {_line(problem).removeprefix(f'{name}: ')}", file=sys.stderr)
        return 1 if isinstance(problem, ImportError) else 2
    except RuntimeError as problem:
        if "memory" not in str(problem):  # which torch's allocator has no class of its own for
            raise
        print(f"{name}: not enough memory", file=sys.stderr)
        return 2
    return 0


def _line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _enroll(args: argparse.Namespace) -> None:
    if (args.embeddings is None) != (args.identities is None):
        raise ValueError("--embeddings and --identities go together")
    if args.embeddings is None and not args.remove and args.threshold is None:
        raise ValueError("nothing to do: give --embeddings and --identities, --remove or --threshold")
    embeddings = None if args.embeddings is None else _read_embeddings("enroll", args.embeddings)
    names = None if args.identities is None else _read_names(args.identities)
    if names is not None and len(names) != len(embeddings):
        raise ValueError(f"{args.identities}: {len(names)} names for {len(embeddings)} embeddings")
    is_new = not args.gallery.exists()
    if is_new and embeddings is None:
        raise ValueError(f"{args.gallery}: no gallery there")
    args.gallery.mkdir(exist_ok=True)
    try:
        with locked(args.gallery):
            gallery = _gallery(args, embeddings)
            for name in args.remove:
                gallery.remove(name)
            if embeddings is not None:
                gallery.enroll(names, embeddings)
            if args.threshold is not None:
                gallery.threshold = args.threshold
            gallery.save(args.gallery)
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty if all went well
                args.gallery.rmdir()
    print(f"{args.gallery}: {len(gallery)} identities, {gallery.template_count} templates")


def _gallery(args: argparse.Namespace, embeddings: Tensor | None) -> Gallery:
    """The one in the folder, or a new one for these embeddings."""
    if not (args.gallery / JSON_NAME).exists() and embeddings is not None:
        return Gallery(embeddings.shape[1], distance=args.distance or "euclidean")
    gallery = _load(args.gallery)
    if args.distance not in (None, gallery.distance):
        raise ValueError(f"--distance {args.distance}: the gallery is one of {gallery.distance} distances")
    return gallery


def _identify(args: argparse.Namespace) -> None:
    queries = _read_embeddings("identify", args.embeddings)
    gallery = _load(args.gallery)
    if args.threshold is not None:
        gallery.threshold = args.threshold
    found = _candidates(gallery, queries, args.k)
    if args.output:
        content = {"distance": gallery.distance, "threshold": gallery.threshold, "queries": found}
        write_beside(args.output, lambda file: file.write(json.dumps(content).encode()))
    for i, candidates in enumerate(found):
        print(f"{i}: {', '.join(map(_shown, candidates)) or 'unknown'}")


def _candidates(gallery: Gallery, queries: Tensor, k: int) -> list[list[Candidate]]:
    """What `Gallery.identify` finds for every query, and who is nearest where that is unknown."""
    distances, indices = gallery.search(queries, k)
    known = distances < (torch.inf if gallery.threshold is None else gallery.threshold)
    names = gallery.identities
    rows = zip(indices.tolist(), known.tolist(), distances.tolist(), strict=True)
    return [
        [
            {"identity": names[i] if is_known else None, "nearest": names[i], "distance": distance}
            for i, is_known, distance in zip(*row, strict=True)
            if i >= 0  # where the gallery has fewer than k
        ]
        for row in rows
    ]


def _shown(candidate: Candidate) -> str:
    """Quoted as in JSON: a name can hold anything, control characters too."""
    name = json.dumps(candidate["nearest"], ensure_ascii=False)
    return f"{f'unknown ({name})' if candidate['identity'] is None else name} {candidate['distance']:.6g}"


# ---- what is read ------------------------------------------------------------------------------------------


def _load(folder: Path) -> Gallery:
    try:
        return Gallery.load(folder)
    except FileNotFoundError as problem:
        raise ValueError(f"{folder}: no gallery there: {problem.filename} is missing") from None


def _read_embeddings(function: str, path: Path) -> Tensor:
    rows = torch.from_numpy(in_memory(map_embeddings(function, path)))
    return rows.float() if rows.dtype is torch.float64 else rows


def _read_names(path: Path) -> list[str]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path}: no UTF-8 text: {problem}") from None
    if not lines[-1]:
        lines.pop()
    names = [line.removesuffix("\r") for line in lines]
    if "" in names:
        raise ValueError(f"{path}: line {names.index('') + 1} is empty")
    return names
