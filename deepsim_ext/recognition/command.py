"""The commands `enroll` and `identify` on a gallery in a folder."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .._checks.options import DISTANCES
from .._files import write_beside
from .._npy import in_memory, map_embeddings
from .gallery import Gallery, Identification
from .storage import JSON_NAME, locked


def add_enroll_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `enroll` to a parser."""
    parser.add_argument("gallery", type=Path, help="folder of the gallery; made if need be")
    parser.add_argument("--embeddings", type=Path, metavar="FILE.npy", help="[N, D], floating point")
    parser.add_argument("--identities", type=Path, metavar="FILE.txt", help="N names, one per line, UTF-8")
    parser.add_argument("--remove", nargs="+", default=[], metavar="NAME", help="before anybody is enrolled")
    parser.add_argument("--distance", choices=DISTANCES, help="of a new gallery (default: euclidean)")
    parser.add_argument("--threshold", type=float, help="the gallery's: farther queries are unknown")


def add_identify_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `identify` to a parser."""
    parser.add_argument("gallery", type=Path, help="folder of the gallery")
    parser.add_argument("--embeddings", type=Path, required=True, metavar="FILE.npy", help="[Q, D]")
    parser.add_argument("-k", type=int, default=1, help="identities per query (default: %(default)s)")
    parser.add_argument("--threshold", type=float, help="default: the gallery's")
    parser.add_argument("--output", type=Path, metavar="FILE.json")


def run_enroll(args: argparse.Namespace) -> int:
    """Enrolls and removes, or changes nothing: exit code 1 for a missing package, 2 for unusable input."""
    return _exit_code("enroll", _enroll, args)


def run_identify(args: argparse.Namespace) -> int:
    """Identifies; exit code 0, 1 for a missing package, 2 for unusable input."""
    return _exit_code("identify", _identify, args)


def _exit_code(name: str, run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    try:
        run(args)
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
        dtype = embeddings.dtype if embeddings.dtype is torch.float64 else torch.float32
        return Gallery(embeddings.shape[1], distance=args.distance or "euclidean", dtype=dtype)
    gallery = _load(args.gallery)
    if args.distance not in (None, gallery.distance):
        raise ValueError(f"--distance {args.distance}: the gallery is one of {gallery.distance} distances")
    return gallery


def _identify(args: argparse.Namespace) -> None:
    queries = _read_embeddings("identify", args.embeddings)
    gallery = _load(args.gallery)
    if args.threshold is not None:
        gallery.threshold = args.threshold
    found = gallery.identify(queries, args.k)
    if args.output:
        content = {"distance": gallery.distance, "threshold": gallery.threshold, "queries": _as_json(found)}
        write_beside(args.output, lambda file: file.write(json.dumps(content).encode()))
    for i, candidates in enumerate(_as_json(found)):
        print(f"{i}: {', '.join(map(_shown, candidates)) or 'unknown'}")


def _as_json(found: Identification) -> list[list[dict[str, str | float | None]]]:
    """A list of candidates for every query; identity None is unknown."""
    rows = zip(found.identities, found.distances.tolist(), strict=True)
    return [
        [
            {"identity": identity, "distance": distance}
            for identity, distance in zip(*row, strict=True)
            if math.isfinite(distance)  # where the gallery has fewer than k
        ]
        for row in rows
    ]


def _shown(candidate: dict[str, str | float | None]) -> str:
    """Quoted as in JSON: a name can hold anything, control characters too."""
    identity = candidate["identity"]
    name = "unknown" if identity is None else json.dumps(identity, ensure_ascii=False)
    return f"{name} {candidate['distance']:.6g}"


# ---- what is read ------------------------------------------------------------------------------------------


def _load(folder: Path) -> Gallery:
    try:
        return Gallery.load(folder)
    except FileNotFoundError as problem:
        raise ValueError(f"{folder}: no gallery there: {problem.filename} is missing") from None


def _read_embeddings(function: str, path: Path) -> Tensor:
    return torch.from_numpy(in_memory(map_embeddings(function, path)))


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
