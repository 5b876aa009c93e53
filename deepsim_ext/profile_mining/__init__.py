"""`python -m deepsim_ext profile-mining`: how fast triplets are mined here, stage by stage.

Needs the extra `deepsim-ext[profile]`; its packages are imported only when the command runs. With
`--simulate` it says what batch-hard over many ranks costs, and needs none.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import sys
from pathlib import Path

# import name -> name on PyPI
PACKAGES = {"matplotlib": "matplotlib", "tqdm": "tqdm"}
LOSSES = ("batch_hard", "batch_hard_soft", "semi_hard", "batch_all", "mine", "torch_eager")
DISTANCES = ("euclidean", "sqeuclidean", "cosine")
DTYPES = ("float32", "bfloat16", "float16", "float64")
ROWS, SIMULATED_ROWS = [1024, 4096, 16384], [2**20]
MACHINES = ("h200-infiniband", "h200-nvlink", "local")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    grid = parser.add_argument_group("what is measured: every combination of these")
    grid.add_argument(
        "--rows",
        type=_positive,
        nargs="+",
        metavar="N",
        help=f"default: {' '.join(map(str, ROWS))}, or {SIMULATED_ROWS[0]} with --simulate",
    )
    grid.add_argument("--dims", type=_positive, nargs="+", default=[128, 512], metavar="D")
    grid.add_argument(
        "--per-class", type=_positive, nargs="+", default=[4], metavar="K", help="rows of each class"
    )
    grid.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    grid.add_argument(
        "--losses",
        nargs="+",
        choices=LOSSES,
        default=["batch_hard"],
        help="batch_hard_triplet_loss, the same with a soft margin, batch_semi_hard_triplet_loss,"
        " batch_all_triplet_loss, batch_hard_mine alone, and the usual batch-hard loss of N x N matrices in"
        " plain torch",
    )
    grid.add_argument("--distances", nargs="+", choices=DISTANCES, default=["euclidean"])
    grid.add_argument("--devices", nargs="+", default=["cpu"], help="cpu, cuda, cuda:1, ...")
    data = parser.add_argument_group("your own data instead of random embeddings")
    data.add_argument("--embeddings", type=Path, metavar="FILE.npy", help="[N, D], floating point")
    data.add_argument("--labels", type=Path, metavar="FILE.npy", help="[N], integers")
    ranks = parser.add_argument_group("what batch-hard over many ranks costs, instead: mode ring, by a model")
    ranks.add_argument("--simulate", action="store_true", help="predict, for --rows, --dims and --dtypes")
    ranks.add_argument("--ranks", type=_positive, nargs="+", metavar="R")
    ranks.add_argument(
        "--machine",
        choices=MACHINES,
        help="what a rank is (default: h200-infiniband); local is a process on this machine, whose figures"
        " are measured, and so is the time of 2 to 8 ranks",
    )
    ranks.add_argument(
        "--bandwidth", type=_above_zero, metavar="GB/s", help="out of a rank, in place of the machine's"
    )
    ranks.add_argument("--latency", type=_above_zero, metavar="US", help="of a small message, microseconds")
    ranks.add_argument("--rate", type=_above_zero, metavar="TFLOP/s", help="of a rank's tiles")
    parser.add_argument("--margin", type=float, default=0.2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed runs for each (default: 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("profile_mining"), help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--trace", action="store_true", help="also write trace.json for chrome://tracing or Perfetto"
    )


def run(args: argparse.Namespace) -> int:
    """Profiles; exit code 0, 1 for a failed case, unusable input or a missing package, 130 after Ctrl-C."""
    try:
        _check_simulation(args)
        if args.simulate:
            return _simulate(args)
    except ValueError as error:
        print(f"profile-mining: {error}", file=sys.stderr)
        return 1
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        print(f'profile-mining: {names} not installed; pip install "deepsim-ext[profile]"', file=sys.stderr)
        return 1
    try:
        return _run(args)
    except ValueError as error:
        print(f"profile-mining: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nprofile-mining: interrupted; the cases so far are written", file=sys.stderr)
        return 130


def _check_simulation(args: argparse.Namespace) -> None:
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


def _simulate(args: argparse.Namespace) -> int:
    from . import simulate

    units = {"bandwidth": 1e9, "latency": 1e-6, "rate": 1e12}
    overrides = {name: getattr(args, name) * unit for name, unit in units.items() if getattr(args, name)}
    rows, machine = args.rows or SIMULATED_ROWS, args.machine or "h200-infiniband"
    print(simulate.report(simulate.simulate(rows, args.dims, args.dtypes, args.ranks, machine, overrides)))
    return 0


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from . import measure, report

    own = measure.load(args.embeddings, args.labels)
    for device in args.devices:
        measure.check_device(device)
    options = itertools.product(args.devices, args.losses, args.distances, args.dtypes)
    if own is None:
        sizes = list(itertools.product(args.dims, args.rows or ROWS, args.per_class))
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
    records: list[measure.Record] = []
    try:
        for case in cases:
            progress.set_description(str(case))
            records.append(measure.profile(case, own, margin=args.margin, seconds=args.seconds, peaks=peaks))
            progress.update()
        ran = [case for case, record in zip(cases, records, strict=True) if "both_ms" in record]
        if args.trace and ran:
            measure.trace(ran[0], own, margin=args.margin, path=args.output / "trace.json")
    finally:
        progress.close()
        if records:
            report.write(records, peaks, args.output)
    print(report.table(records))
    print(f"\nwritten to {args.output.resolve()}: {', '.join(sorted(p.name for p in args.output.iterdir()))}")
    return int(any("failed" in record for record in records))


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text}")
    return value
