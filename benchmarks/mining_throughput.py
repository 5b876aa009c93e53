"""`python -m benchmarks.mining_throughput`: profile-mining over the usual sizes, into results/mining."""

from __future__ import annotations

import sys
from pathlib import Path

from deepsim_ext.cli import main

GRID = [
    "--rows",
    "256",
    "1024",
    "4096",
    "16384",
    "--dims",
    "128",
    "512",
    "--losses",
    "batch_hard",
    "torch_eager",
]

if __name__ == "__main__":
    folder = Path(__file__).parent / "results" / "mining"
    sys.exit(main(["profile-mining", *GRID, "--output", str(folder), *sys.argv[1:]]))
