"""`python -m benchmarks.readme`: writes the README's figures from the records in results/.

cpu-<op>.json are of `python -m benchmarks.run`, hardness.json of `python -m benchmarks.hardness`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from . import (
    bench_all_pairs,
    bench_distributed,
    bench_gallery,
    bench_given_rows,
    bench_style,
    bench_stylize,
    bench_verification,
    hardness,
)
from .report import Record, table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- {}: python -m benchmarks.readme -->\n", "<!-- end of {} -->\n"

BATCH_HARD_CASES = [f"N={n} D={d} float32" for d in (128, 512) for n in (256, 1024, 4096, 8192)]
ALL_PAIRS_CASES = [
    f"{loss} N={n} D={bench_all_pairs.D} K={bench_all_pairs.K}"
    for n in bench_all_pairs.SIZES
    for loss in bench_all_pairs.OURS
]
STYLE_CASES = [
    bench_style.case_name(size, batch=batch)
    for batch in bench_style.BATCHES
    for size in bench_style.IMAGE_SIZES
]
BATCH_HARD_RIVALS = ["torch eager", "torch.compile", "torch row-chunked", "pytorch-metric-learning"]
ALL_PAIRS_RIVALS = ["torch eager", "pytorch-metric-learning", "sentence-transformers"]
STYLE_RIVALS = ["torch eager", "torch.compile", "one-GEMM Function"]


def _where(result: dict[str, Any]) -> str:
    where = result["environment"]
    return (
        f"{where['cpu']}, {where['threads']} threads, {where['cpu_kernels']} kernels, torch {where['torch']}"
    )


def batch_hard_section(result: dict[str, Any]) -> str:
    """A line that says where it was measured, and a table."""
    return "\n".join(
        [
            f"Forward + backward, float32, {_where(result)}. Medians of interleaved runs in one process."
            " *mm* is one `torch.mm(X, X.T)`. *× faster* is against each rival. *MiB* is the peak beyond the"
            " input, gradient included.",
            "",
            *_table(result["records"], "batch_hard", BATCH_HARD_CASES, BATCH_HARD_RIVALS),
            "",
        ]
    )


def style_section(result: dict[str, Any]) -> str:
    """A line that says where it was measured, and a table."""
    return "\n".join(
        [
            f"Style loss over VGG19's conv1_1 … conv5_1 of pictures, {_where(result)}; *mm* is the products"
            " `F @ F.T` of all layers:",
            "",
            *_table(result["records"], bench_style.NAME, STYLE_CASES, STYLE_RIVALS),
            "",
        ]
    )


def stylize_section(result: dict[str, Any]) -> str:
    """What the style loss is worth within a whole step."""
    records = result["records"]
    times = {r["contender"]: r["p50_ms"] for r in records if r.get("phase") == "both"}
    peaks = {r["contender"]: r["peak_bytes"] / 2**20 for r in records if "peak_bytes" in r}
    ours, eager = "deepsim_ext", "torch eager"
    side = bench_stylize.SIDE
    return (
        "Nearly all of a step of style transfer is VGG19 itself: at"
        f" {side}x{side} forward, losses and gradient take {times[ours]:.0f} ms and {peaks[ours]:.0f} MiB,"
        f" with torch's style loss {times[eager]:.0f} ms and {peaks[eager]:.0f} MiB ({_where(result)}).\n"
    )


def all_pairs_section(result: dict[str, Any]) -> str:
    """A line that says where it was measured, a table of the losses, a line about nearest neighbours."""
    n, k = bench_all_pairs.NEIGHBORS
    case = f"nearest_neighbors N={n} D={bench_all_pairs.D} k={k}"
    times = {r["contender"]: r for r in result["records"] if r["case"] == case and r["kind"] == "time"}
    ours = times["deepsim_ext"]
    faiss = times["faiss IndexFlatL2"]["p50_ms"] / ours["p50_ms"]
    return "\n".join(
        [
            f"Forward + backward, float32, {_where(result)}:",
            "",
            *_table(result["records"], "all_pairs", ALL_PAIRS_CASES, ALL_PAIRS_RIVALS),
            "",
            f"The {k} nearest neighbours of each of {n} rows among the others, D={bench_all_pairs.D}:"
            f" {ours['p50_ms']:.0f} ms, {ours['product_ratio']:.2f} mm,"
            f" {faiss:.1f} times as fast as faiss' IndexFlatL2.",
            "",
        ]
    )


def given_rows_section(result: dict[str, Any]) -> str:
    """A line that says where it was measured, and a table: times, and how much faster than each rival."""
    rivals = ["torch eager", "torch.compile"]
    times = {(r["case"], r["contender"]): r["p50_ms"] for r in result["records"] if r.get("phase") == "both"}
    rows = []
    for loss in bench_given_rows.LOSSES:
        row = [loss]
        for t in bench_given_rows.SIZES:
            case = bench_given_rows.case_name(loss, t)
            ours = times[case, "deepsim_ext"]
            row += [f"{ours:.2f}", *(f"{times[case, rival] / ours:.2f}" for rival in rivals)]
        rows.append(row)
    header = [""]
    for t in bench_given_rows.SIZES:
        header += [f"T={t:,}, ms", "× eager", "× compiled"]
    return (
        f"Losses of T given triplets or pairs, D={bench_given_rows.D}, forward + backward, and how many times"
        f" as fast as torch's, eager and compiled ({_where(result)}):\n\n{table(header, rows)}"
    )


def verification_section(result: dict[str, Any]) -> str:
    """How long the protocol takes."""
    times = {r["contender"]: r["p50_ms"] for r in result["records"]}
    return (
        f"The whole protocol on {bench_verification.PAIRS:,} pairs of {bench_verification.D} numbers, with"
        f" distances, {bench_verification.FOLDS} folds and VAL@FAR={bench_verification.FAR:g}, takes"
        f" {times['deepsim_ext']:.0f} ms; the usual loop over thresholds"
        f" {times[bench_verification.LOOP] / 1e3:.1f} s ({_where(result)}).\n"
    )


def gallery_section(result: dict[str, Any]) -> str:
    """How long searches take, beside faiss."""
    times = {(r["case"], r["contender"]): r["p50_ms"] for r in result["records"] if "p50_ms" in r}
    rows = []
    for queries in bench_gallery.QUERIES:
        case = bench_gallery.case_name(bench_gallery.ROWS, queries)
        ours, faiss = times[case, "deepsim_ext"], times[case, bench_gallery.FAISS]
        rows.append([f"{queries:,}", f"{ours:,.0f}", f"{faiss:,.0f}"])
    header = ["queries", "`nearest_neighbors`, ms", f"{bench_gallery.FAISS}, ms"]
    return (
        f"The {bench_gallery.K} nearest of {bench_gallery.ROWS:,} rows, D={bench_gallery.D}"
        f" ({_where(result)}):\n\n{table(header, rows)}"
    )


def distributed_section(result: dict[str, Any]) -> str:
    """Times of the ring and of gathering beside one process."""
    ways = [bench_distributed.ALONE, *map(bench_distributed.contender, bench_distributed.MODES)]
    times = {(r["case"], r["contender"]): r["p50_ms"] for r in result["records"] if "p50_ms" in r}
    blocks = {(r["case"], r["contender"]): r["blocks"] for r in result["records"] if "blocks" in r}
    rows = []
    for n in bench_distributed.SIZES:
        case = bench_distributed.case_name(n)
        held = blocks[case, bench_distributed.contender("ring")]
        rows.append([f"{n:,}", *(f"{times[case, way]:.1f}" for way in ways), f"{held:.1f}"])
    header = ["N in all", *(f"{way}, ms" for way in ways), "ring, peak of a rank in blocks of its rows"]
    return (
        f"Batch-hard, forward + backward, D={bench_distributed.D}, one thread a process, over gloo on one"
        f" machine ({_where(result)}):\n\n{table(header, rows)}"
    )


def _table(records: list[Record], op: str, cases: list[str], rivals: list[str]) -> list[str]:
    header = ["", "ms", "mm", *(f"× faster than {rival}" for rival in rivals), "MiB", "MiB, torch eager"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for case in cases:
        mine = [r for r in records if r["op"] == op and r["case"] == case]
        times = {r["contender"]: r["p50_ms"] for r in mine if r.get("phase") == "both"}
        peaks = {r["contender"]: r["peak_bytes"] / 2**20 for r in mine if "peak_bytes" in r}
        ratio = next(r for r in mine if r["contender"] == "deepsim_ext" and r.get("phase") == "both")
        lines.append(
            [
                case.removesuffix(" float32"),
                f"{times['deepsim_ext']:.1f}",
                f"{ratio['product_ratio']:.2f}",
                *(f"{times[r] / times['deepsim_ext']:.1f}" if r in times else "–" for r in rivals),
                *(f"{peaks[name]:.0f}" if name in peaks else "–" for name in ("deepsim_ext", "torch eager")),
            ]
        )
    return ["| " + " | ".join(line) + " |" for line in lines]


def hardness_section(result: dict[str, Any]) -> str:
    """For every case and library the largest errors of its losses, and its choices: not the best, wrong."""
    header = [""]
    for library in hardness.LIBRARIES:
        header += [f"{library}: loss", "gradient", "choices"]
    rows = []
    for case in dict.fromkeys(r["case"] for r in result["records"]):
        row = [case]
        for library in hardness.LIBRARIES:
            mine = [r for r in result["records"] if (r["case"], r["library"]) == (case, library)]
            losses = [r for r in mine if "gradient_error" in r]
            row += [_worst(losses, "error"), _worst(losses, "gradient_error")]
            not_best, wrong, choices = (
                sum(r[key] for r in mine if key in r) for key in ("not_best", "wrong", "choices")
            )
            row.append(f"{not_best}, {wrong} of {choices}")
        rows.append(row)
    return table(header, rows)


def _worst(records: list[Record], key: str) -> str:
    """The largest error; NaN is worse than all."""
    errors = [float(r[key]) for r in records]
    return hardness.as_text(max(errors, key=lambda error: (math.isnan(error), error)))


def with_section(text: str, name: str, new: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return before + begin + new + end + after


# Each section by its markers' name, and the record that it is made from.
SECTIONS = {
    "batch-hard": (batch_hard_section, RESULTS / "cpu-batch_hard.json"),
    "style": (style_section, RESULTS / "cpu-style.json"),
    "stylize": (stylize_section, RESULTS / "cpu-stylize.json"),
    "all pairs": (all_pairs_section, RESULTS / "cpu-all_pairs.json"),
    "given rows": (given_rows_section, RESULTS / "cpu-given_rows.json"),
    "verification": (verification_section, RESULTS / "cpu-verification.json"),
    "gallery": (gallery_section, RESULTS / "cpu-gallery.json"),
    "distributed": (distributed_section, RESULTS / "cpu-distributed.json"),
    "hardness": (hardness_section, hardness.RESULT),
}


def with_figures(text: str) -> str:
    """`text` with every section replaced by what the records say."""
    for name, (section, path) in SECTIONS.items():
        text = with_section(text, name, section(json.loads(path.read_text())))
    return text


if __name__ == "__main__":
    README.write_text(with_figures(README.read_text()))
