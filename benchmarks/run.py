"""`python -m benchmarks.run`: measures, writes JSON, Markdown and plots, prints the promised figures.

A missed time never fails the run; a contender of ours that fails or gives wrong values does.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from pathlib import Path

from tqdm import tqdm

from . import bench_all_pairs, bench_batch_hard, bench_style
from .environment import environment
from .report import markdown, plots
from .timing import Record

BENCHES = {bench.NAME: bench for bench in (bench_batch_hard, bench_all_pairs, bench_style)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cases, nothing compiled: under a minute")
    parser.add_argument("--only", choices=BENCHES, help="one bench instead of all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args(arguments)

    where = environment()
    # Objects that exist now need no look by the collector, which may run inside a timed call.
    gc.freeze()
    records: list[Record] = []
    chosen = [BENCHES[options.only]] if options.only else list(BENCHES.values())
    progress = tqdm([job for bench in chosen for job in bench.jobs(options.quick)])
    for name, job in progress:
        progress.set_description(name)
        records += job()
    # The promised figures are about the full cases.
    measured = [] if options.quick else chosen
    bars = [bar for bench in measured for bar in bench.bars([r for r in records if r["op"] == bench.NAME])]

    stem = "-".join(["cpu", *(["quick"] if options.quick else []), *([options.only] if options.only else [])])
    options.output.mkdir(parents=True, exist_ok=True)
    result = {
        "environment": where,
        "quick": options.quick,
        "bars": [dataclasses.asdict(bar) | {"status": bar.status} for bar in bars],
        "records": records,
    }
    (options.output / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.output / f"{stem}.md").write_text(markdown(where, records, bars))
    plots(where, records, options.output, stem)
    print(*bars, f"written: {options.output / stem}.json, .md and plots", sep="\n")

    failures = [
        f"{r['op']} {r['case']}: {r.get('skipped', 'value or gradient beyond tolerance')}"
        for r in records
        if r["contender"] == "deepsim_ext" and ("skipped" in r or not r.get("valid", True))
    ]
    print("\n".join(dict.fromkeys(failures)), file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
