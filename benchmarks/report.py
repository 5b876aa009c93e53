"""Results as Markdown tables and as plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from .timing import Record

matplotlib.use("Agg")

COLOURS = {
    "deepsim_ext": "#c44e52",
    "torch eager": "#4c72b0",
    "torch.compile": "#64b5cd",
    "torch row-chunked": "#8172b2",
    "one-GEMM Function": "#8172b2",
    "pytorch-metric-learning": "#ccb974",
    "sentence-transformers": "#55a868",
    "faiss IndexFlatL2": "#55a868",
    "2 ranks, ring": "#c44e52",
    "2 ranks, gather": "#4c72b0",
}

EXPLANATION = """\
Medians (p50) of interleaved runs on fresh random inputs. p20–p80, GFLOP/s and ratios are of forward +
backward (of the product itself, of forward). Backward is the rest of a training step after forward, with the
allocation of the gradient and the freeing of what forward saved. GFLOP/s counts nominal work, stated in the
module of each bench. Errors are relative to float64; *right* says whether they are within tolerance. Memory
is allowed the gradient and, in batch-hard, one packed copy of the input.
"""


@dataclass(frozen=True)
class Bar:
    """A promised limit and the figure measured for it, None if this run has none."""

    text: str
    figure: float | None
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        return f"{self.status:12} {self.text}: {_number(self.figure)} ({self.limit})"

    @property
    def limit(self) -> str:
        return f"at least {self.at_least:g}" if self.at_most is None else f"at most {self.at_most:g}"

    @property
    def status(self) -> str:
        if self.figure is None:
            return "not measured"
        missed = self.figure < self.at_least if self.at_most is None else self.figure > self.at_most
        return "MISS" if missed else "pass"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:.0f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _milliseconds(record: Record | None) -> str:
    return _number(record["p50_ms"]) if record else "–"


def _time_rows(records: list[Record]) -> list[list[str]]:
    rows = []
    for case in dict.fromkeys(r["case"] for r in records):
        in_case = [r for r in records if r["case"] == case]
        for name in dict.fromkeys(r["contender"] for r in in_case):
            phases = {r.get("phase", "skipped"): r for r in in_case if r["contender"] == name}
            if "skipped" in phases:
                rows.append([case, name, phases["skipped"]["skipped"], *["–"] * 9])
                continue
            full = phases.get("both") or phases["forward"]
            errors = f"{_number(full.get('value_error'), 2)}, {_number(full.get('gradient_error'), 2)}"
            rows.append(
                [
                    case,
                    name,
                    _milliseconds(phases.get("forward")),
                    _milliseconds(phases.get("backward")),
                    _milliseconds(phases.get("both")),
                    f"{_number(full['p20_ms'])}–{_number(full['p80_ms'])}",
                    str(full["runs"]),
                    _number(full.get("gflops")),
                    _number(full.get("product_ratio")),
                    _number(full.get("speedup")),
                    errors,
                    "yes" if full.get("valid", True) else "NO",
                ]
            )
    return rows


def _memory_rows(records: list[Record]) -> list[list[str]]:
    return [
        [r["case"], r["contender"], r["skipped"], "–"]
        if "skipped" in r
        else [r["case"], r["contender"], _number(r["peak_bytes"] / 2**20), _number(r["beyond_bytes"] / 2**20)]
        for r in records
    ]


def markdown(environment: Record, records: list[Record], bars: list[Bar]) -> str:
    """The whole report of one op."""
    time_header = ["case", "contender", "forward ms", "backward ms", "both ms", "p20–p80", "runs", "GFLOP/s"]
    time_header += ["× product", "× faster than eager", "error: value, gradient", "right"]
    memory_header = ["case", "contender", "peak MiB", "less what is allowed MiB"]
    parts = [
        f"# Benchmark: {records[0]['op']}\n" if records else "# Benchmark\n",
        "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in environment.items()) + "\n",
        EXPLANATION,
    ]
    memory = [r for r in records if r["kind"] == "memory"]
    parts += ["## Time\n", table(time_header, _time_rows([r for r in records if r["kind"] == "time"]))]
    if memory:
        parts += [
            "## Peak memory of forward + backward, beyond the input\n",
            table(memory_header, _memory_rows(memory)),
        ]
    if bars:
        rows = [[bar.status, bar.text, _number(bar.figure), bar.limit] for bar in bars]
        parts += ["## Bars\n", table(["status", "bar", "measured", "limit"], rows)]
    return "\n".join(parts)


def _bars(title: str, unit: str, values: dict[str, dict[str, float]], path: Path) -> None:
    """Grouped bars, `values[case][contender]`, logarithmic where they differ more than tenfold."""
    names = list(dict.fromkeys(name for by_name in values.values() for name in by_name))
    width = 0.85 / len(names)
    figure, axes = plt.subplots(figsize=(max(7, 1.3 * len(values) + 1), 4.5), layout="constrained")
    for column, name in enumerate(names):
        places = [i for i, by_name in enumerate(values.values()) if name in by_name]
        heights = [by_name[name] for by_name in values.values() if name in by_name]
        offsets = [place + (column - (len(names) - 1) / 2) * width for place in places]
        drawn = axes.bar(offsets, heights, width, label=name, color=COLOURS[name])
        if name == "deepsim_ext":
            axes.bar_label(drawn, labels=[_number(height) for height in heights], padding=2, fontsize=8)
    every = [height for by_name in values.values() for height in by_name.values()]
    if max(every) > 10 * min(every):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xticks(range(len(values)), [case.replace(" ", "\n", 1) for case in values], fontsize=8)
    axes.set_ylabel(unit)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", fontsize=8, ncols=len(names), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plots(environment: Record, records: list[Record], path: Path) -> list[Path]:
    """Beside `path`: forward + backward in units of the plain product, and the peak memory, of one op."""
    machine = f"{environment['cpu']}, {environment['threads']} threads, torch {environment['torch']}"
    times: dict[str, dict[str, float]] = {}
    memory: dict[str, dict[str, float]] = {}
    for r in records:
        if r.get("phase") == "both" and "product_ratio" in r:
            times.setdefault(r["case"], {})[r["contender"]] = r["product_ratio"]
        if "peak_bytes" in r:
            memory.setdefault(r["case"], {})[r["contender"]] = r["peak_bytes"] / 2**20
    paths = []
    for kind, values, title, unit in (
        ("time", times, "forward + backward", "time / one plain product"),
        ("memory", memory, "peak memory of forward + backward beyond the input", "MiB"),
    ):
        if values:
            paths.append(path.with_name(f"{path.stem}_{kind}.png"))
            _bars(f"{records[0]['op']}: {title}\n{machine}", unit, values, paths[-1])
    return paths
