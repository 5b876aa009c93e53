"""`python -m benchmarks.run`: measures, writes JSON, Markdown and plots of each op, prints the bars.

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

from . import (
    bench_all_pairs,
    bench_batch_hard,
    bench_distributed,
    bench_gallery,
    bench_given_rows,
    bench_style,
    bench_stylize,
    bench_verification,
)
from .environment import environment
from .report import markdown, plots
from .timing import Record

BENCHES = {
    bench.NAME: bench
    for bench in (
        bench_batch_hard,
        bench_all_pairs,
        bench_given_rows,
        bench_style,
        bench_stylize,
        bench_verification,
        bench_gallery,
        bench_distributed,
    )
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cases, nothing compiled: under a minute")
    parser.add_argument("--only", choices=BENCHES, help="one bench instead of all")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args(arguments)

    where = environment()
    # Objects that exist now need no look by the collector, which may run inside a timed call.
    gc.freeze()
    options.output.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for name in [options.only] if options.only else BENCHES:
        records += run_bench(name, where, options.quick, options.output)

    failures = [
        f"{r['op']} {r['case']}: {r.get('skipped', 'value or gradient beyond tolerance')}"
        for r in records
        if r["contender"] == "deepsim_ext" and ("skipped" in r or not r.get("valid", True))
    ]
    print("\n".join(dict.fromkeys(failures)), file=sys.stderr)
    return int(bool(failures))


def run_bench(name: str, where: Record, quick: bool, folder: Path) -> list[Record]:
    """Measures one op and writes its files into `folder`."""
    bench = BENCHES[name]
    records: list[Record] = []
    progress = tqdm(bench.jobs(quick))
    for case, job in progress:
        progress.set_description(case)
        records += job()
    # The promised figures are about the full cases.
    bars = [] if quick else bench.bars(records)
    path = folder / f"cpu{'-quick' if quick else ''}-{name}.json"
    result = {
        "environment": where,
        "quick": quick,
        "bars": [dataclasses.asdict(bar) | {"status": bar.status} for bar in bars],
        "records": records,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(where, records, bars))
    plots(where, records, path)
    print(*bars, f"written: {path}, .md and plots", sep="\n")
    return records


if __name__ == "__main__":
    raise SystemExit(main())
