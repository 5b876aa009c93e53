"""`python -m deepsim_ext profile-mining`: how fast triplets are mined here, stage by stage.

Needs the extra `deepsim-ext[profile]`; its packages are imported only when the command runs. With
`--simulate` it says what batch-hard over many ranks costs, and needs none.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .._command_line import integer, not_negative, positive

if TYPE_CHECKING:
    from .measure import Record

# import name -> name on PyPI
PACKAGES = {"matplotlib": "matplotlib", "tqdm": "tqdm"}
LOSSES = ("batch_hard", "batch_hard_soft", "semi_hard", "batch_all", "mine", "torch_eager")
DISTANCES = ("euclidean", "sqeuclidean", "cosine")
DTYPES = ("float32", "bfloat16", "float16", "float64")
ROWS, SIMULATED_ROWS = [1024, 4096, 16384], [2**20]
DIMS, PER_CLASS = [128, 512], [4]
MACHINES = ("h200-infiniband", "h200-nvlink", "local")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    at_least_1 = integer(1)
    grid = parser.add_argument_group("what is measured: every combination of these")
    grid.add_argument(
        "--rows",
        type=at_least_1,
        nargs="+",
        metavar="N",
        help=f"default: {' '.join(map(str, ROWS))}, or {SIMULATED_ROWS[0]} with --simulate",
    )
    grid.add_argument(
        "--dims",
        type=at_least_1,
        nargs="+",
        metavar="D",
        help=f"numbers in an embedding (default: {' '.join(map(str, DIMS))})",
    )
    grid.add_argument(
        "--per-class",
        type=at_least_1,
        nargs="+",
        metavar="K",
        help=f"rows of each class (default: {PER_CLASS[0]})",
    )
    grid.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of embeddings (default: float32)"
    )
    grid.add_argument(
        "--losses",
        nargs="+",
        choices=LOSSES,
        default=["batch_hard"],
        help="batch_hard_triplet_loss, the same with a soft margin, batch_semi_hard_triplet_loss,"
        " batch_all_triplet_loss, batch_hard_mine alone, and the usual batch-hard loss of N x N matrices in"
        " plain torch (default: batch_hard)",
    )
    grid.add_argument(
        "--distances",
        nargs="+",
        choices=DISTANCES,
        default=["euclidean"],
        help="between embeddings (default: euclidean)",
    )
    grid.add_argument("--devices", nargs="+", default=["cpu"], help="cpu, cuda, cuda:1, ... (default: cpu)")
    data = parser.add_argument_group("your own data instead of random embeddings")
    data.add_argument("--embeddings", type=Path, metavar="FILE.npy", help="[N, D], floating point")
    data.add_argument("--labels", type=Path, metavar="FILE.npy", help="[N], integers")
    ranks = parser.add_argument_group("what batch-hard over many ranks costs, instead: mode ring, by a model")
    ranks.add_argument("--simulate", action="store_true", help="predict, for --rows, --dims and --dtypes")
    ranks.add_argument("--ranks", type=at_least_1, nargs="+", metavar="R", help="how many")
    ranks.add_argument(
        "--machine",
        choices=MACHINES,
        help="what a rank is (default: h200-infiniband); local is a process on this machine, whose figures"
        " are measured, and so is the time of 2 to 8 ranks",
    )
    ranks.add_argument(
        "--bandwidth", type=positive, metavar="GB/s", help="out of a rank, in place of the machine's"
    )
    ranks.add_argument("--latency", type=positive, metavar="US", help="of a small message, microseconds")
    ranks.add_argument("--rate", type=positive, metavar="TFLOP/s", help="of a rank's tiles")
    parser.add_argument(
        "--margin", type=not_negative, default=0.2, help="of the losses (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=positive, default=1.0, help="of timed runs for each (default: 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("profile_mining"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--trace", action="store_true", help="also write trace.json for chrome://tracing or Perfetto"
    )


def run(args: argparse.Namespace) -> int:
    """Profiles; exit code 0, 1 for a failed case or missing package, 2 for unusable input, 130 at Ctrl-C."""
    try:
        _check_together(args)
        if args.simulate:
            return _simulate(args)
    except ValueError as error:
        return _unusable(error)
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        print(f'profile-mining: {names} not installed; pip install "deepsim-ext[profile]"', file=sys.stderr)
        return 1
    records: list[Record] = []
    try:
        return _run(args, records)
    except BrokenPipeError:  # no input: for `ends_quietly`
        raise
    except (ValueError, OSError) as error:
        return _unusable(error)
    except KeyboardInterrupt:
        left = "the cases so far are written" if records else "no case was finished, nothing is written"
        print(f"\nprofile-mining: interrupted; {left}", file=sys.stderr)
        return 130


def _unusable(problem: Exception) -> int:
    print(f"profile-mining: {problem}", file=sys.stderr)
    return 2


def _check_together(args: argparse.Namespace) -> None:
    """ValueError for options of which one leaves the other without a meaning."""
    if args.simulate and args.ranks is None:
        raise ValueError("--simulate needs --ranks")
    options = {
        True: {
            "embeddings": None,
            "labels": None,
            "trace": False,
            "losses": ["batch_hard"],
            "devices": ["cpu"],
        },
        False: dict.fromkeys(("ranks", "machine", "bandwidth", "latency", "rate")),
    }[args.simulate]
    for name, default in options.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name} does not go {'with' if args.simulate else 'without'} --simulate")
    if args.embeddings:
        for name in ("rows", "dims", "per_class"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} does not go with --embeddings")


def _simulate(args: argparse.Namespace) -> int:
    from . import simulate

    units = {"bandwidth": 1e9, "latency": 1e-6, "rate": 1e12}
    overrides = {name: getattr(args, name) * unit for name, unit in units.items() if getattr(args, name)}
    rows, dims = args.rows or SIMULATED_ROWS, args.dims or DIMS
    machine = args.machine or "h200-infiniband"
    print(simulate.report(simulate.simulate(rows, dims, args.dtypes, args.ranks, machine, overrides)))
    return 0


def _run(args: argparse.Namespace, records: list[Record]) -> int:
    """Adds to `records` as cases end; whatever happens then, those there are get written."""
    from tqdm import tqdm

    from . import measure, report

    own = measure.load(args.embeddings, args.labels)
    for device in args.devices:
        measure.check_device(device)
    options = itertools.product(args.devices, args.losses, args.distances, args.dtypes)
    if own is None:
        sizes = list(itertools.product(args.dims or DIMS, args.rows or ROWS, args.per_class or PER_CLASS))
    else:
        sizes = [(own.embeddings.shape[1], own.embeddings.shape[0], 0)]
    cases = [measure.Case(*o, *s) for o in options for s in sizes]
    args.output.mkdir(parents=True, exist_ok=True)

    progress = tqdm(total=len(cases) + 1, disable=None)
    progress.set_description("the machine's peaks")
    try:
        peaks = measure.peaks({(c.device, c.dtype) for c in cases})
    except RuntimeError as error:
        raise ValueError(f"one large product and copy: {str(error).splitlines()[0]}") from None
    progress.update()
    files: list[str] = []
    try:
        for case in cases:
            progress.set_description(str(case))
            records.append(measure.profile(case, own, margin=args.margin, seconds=args.seconds, peaks=peaks))
            progress.update()
        ran = [case for case, record in zip(cases, records, strict=True) if "both_ms" in record]
        if args.trace and ran:
            measure.trace(ran[0], own, margin=args.margin, path=args.output / "trace.json")
            files.append("trace.json")
    finally:
        progress.close()
        if records:
            files += report.write(records, peaks, args.output)
    print(report.table(records))
    print(f"\nwritten to {args.output.resolve()}: {', '.join(sorted(files))}")
    return int(any("failed" in record for record in records))
