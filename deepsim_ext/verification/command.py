"""The command `verify`: from files of embeddings and pairs to accuracy, error rates, JSON and pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import DISTANCES
from .._files import write_beside
from .curves import eer, roc, tar_at_far
from .decisions import best_threshold
from .files import load_embeddings, load_labels, read_pairs
from .pairs import balanced_pairs, pair_distances
from .plots import histogram_png, roc_png
from .protocols import kfold_accuracy, val_at_far
from .results import LabelledPairs

FARS = (0.1, 0.01, 0.001, 0.0001)
FAR = 0.001  # of the validation rate
DRAWN = 3000  # pairs of each kind, as LFW has
UNIT = 1e-3  # how far from 1 the length of a unit vector may be
CHUNK = 4096  # rows whose lengths are computed at a time
# The largest distance of unit vectors.
LARGEST = {"sqeuclidean": 4.0, "euclidean": 2.0, "cosine": 2.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    parser.add_argument(
        "--embeddings", type=Path, required=True, metavar="FILE.npy", help="[N, D], floating point"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--pairs",
        type=Path,
        metavar="FILE.csv",
        help="columns first,second,same: two rows of the embeddings, from 0, and 1 for the same or 0 for"
        " different, in an order in which every fold has both; a first line with these names is optional",
    )
    which.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.npy",
        help="[N], integers: as many same as different pairs are drawn at random",
    )
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=f"of each kind of pairs to draw (default: {DRAWN}, or as many as there are)",
    )
    parser.add_argument("--seed", type=int, help="of the drawing (default: 0)")
    parser.add_argument(
        "--distance",
        choices=DISTANCES,
        default="sqeuclidean",
        help="cosine does not depend on the length of embeddings (default: %(default)s)",
    )
    parser.add_argument("--folds", type=int, default=10, help="of the LFW protocol (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("verification"),
        help="folder for verify.json, roc.png and distances.png (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Verifies; exit code 0, 1 for a missing package, 2 for unusable input, 130 after Ctrl-C."""
    try:
        report, pictures = _evaluated(args)
        args.output.mkdir(parents=True, exist_ok=True)
        files = {"verify.json": (json.dumps(report, indent=1) + "\n").encode(), **pictures}
        for name, content in files.items():
            write_beside(args.output / name, lambda file, content=content: file.write(content))
    except ImportError as problem:
        return _failed(problem, 1)
    except (TypeError, ValueError, OSError, MemoryError) as problem:
        return _failed(problem, 2)
    except KeyboardInterrupt:
        return _failed("interrupted, nothing is saved", 130)
    print(_text(report))
    print(f"\nwritten to {args.output}: {', '.join(files)}")
    return 0


def _failed(problem: object, code: int) -> int:
    line = (str(problem).splitlines() or [type(problem).__name__])[0]
    print(f"verify: {line.removeprefix('verify: ')}", file=sys.stderr)
    return code


def _evaluated(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the JSON file says, and the pictures by their names."""
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {args.output}")
    embeddings = load_embeddings(args.embeddings)
    pairs, same = _pairs(args, len(embeddings))
    distances = pair_distances(embeddings, pairs, distance=args.distance)
    top = _largest(embeddings, pairs, distances, args.distance)

    curve, equal = roc(distances, same), eer(distances, same)
    rates = tar_at_far(distances, same, FARS)
    accuracy = kfold_accuracy(distances, same, folds=args.folds, thresholds=_thresholds(top, 400))
    validation = val_at_far(distances, same, far=FAR, folds=args.folds, thresholds=_thresholds(top, 4000))
    best = best_threshold(distances, same)
    different = int(np.count_nonzero(~same))
    report = {
        "distance": args.distance,
        "same_pairs": len(same) - different,
        "different_pairs": different,
        "folds": args.folds,
        "thresholds_up_to": top,
        "accuracy": _plain(accuracy),
        "validation_rate": {"far_asked": FAR} | _plain(validation),
        "best_threshold": _plain(best),
        "equal_error_rate": _plain(equal),
        "tar_at_far": [
            {"far_asked": asked, "tar": tar, "far": far, "threshold": threshold}
            for asked, tar, far, threshold in zip(FARS, *map(np.ndarray.tolist, rates), strict=True)
        ],
    }
    pictures = {
        "roc.png": roc_png(curve, equal, rates, different),
        "distances.png": histogram_png(distances, same, best, args.distance),
    }
    return report, pictures


def _pairs(args: argparse.Namespace, rows: int) -> LabelledPairs:
    if args.pairs:
        for name in ("count", "seed"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} goes with --labels, got it with --pairs")
        return read_pairs(args.pairs)
    labels = load_labels(args.labels)
    if len(labels) != rows:
        raise ValueError(f"--labels must be one per row of the embeddings [{rows}], got [{len(labels)}]")
    sizes = np.unique(labels, return_counts=True)[1]
    same = int((sizes * (sizes - 1) // 2).sum())
    different = rows * (rows - 1) // 2 - same
    for kind, there in (("the same label", same), ("different labels", different)):
        if not there:
            raise ValueError(f"--labels: {args.labels} has no pair of {kind}")
    count = min(DRAWN, same, different) if args.count is None else args.count
    return balanced_pairs(labels, count, seed=args.seed or 0)


def _largest(embeddings: np.ndarray, pairs: np.ndarray, distances: np.ndarray, distance: str) -> float:
    """Up to where thresholds are tried: LFW's 4 for squared distances of unit vectors, and what it is for
    others; of embeddings of any length, the largest distance."""
    rows = np.unique(pairs)
    if distance == "cosine" or all(
        np.abs(np.linalg.norm(embeddings[rows[i : i + CHUNK]].astype(np.float64), axis=1) - 1).max() < UNIT
        for i in range(0, len(rows), CHUNK)
    ):
        return LARGEST[distance]
    return float(distances.max())


def _thresholds(top: float, steps: int) -> np.ndarray:
    return np.arange(steps) * (top / steps)


def _plain(result: Any) -> dict[str, Any]:
    """A result as JSON has it."""
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in result._asdict().items()}


def _text(report: dict[str, Any]) -> str:
    """What a terminal shows."""
    accuracy, validation = report["accuracy"], report["validation_rate"]
    best, equal = report["best_threshold"], report["equal_error_rate"]
    low, high = accuracy["interval"]
    lines = [
        f"pairs          {report['same_pairs']} same, {report['different_pairs']} different",
        f"accuracy       {accuracy['mean']:.4f} ± {accuracy['std']:.4f} over {report['folds']} folds,"
        f" 95 % interval {low:.4f} to {high:.4f}",
        f"VAL@FAR={FAR:<7g}{validation['mean']:.4f} ± {validation['std']:.4f},"
        f" FAR reached {validation['far']:.4f}",
        f"threshold      {best['threshold']:.4g} ({report['distance']}),"
        f" accuracy {best['accuracy']:.4f} on all pairs",
        f"EER            {equal['rate']:.4f} at {equal['threshold']:.4g}",
        "",
        f"{'FAR':>8}{'TAR':>10}{'reached':>10}{'threshold':>12}",
    ]
    for row in report["tar_at_far"]:
        lines.append(f"{row['far_asked']:>8g}{row['tar']:>10.4f}{row['far']:>10.2g}{row['threshold']:>12.4g}")
    return "\n".join(lines)
