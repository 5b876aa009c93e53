"""The records as a table, JSON, CSV and a roofline plot."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt

from .. import __version__, build_info
from .measure import STAGES, Peaks, Record

MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^", "float64": "D"}
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def table(records: Sequence[Record]) -> str:
    """Throughput, then where the time goes."""
    head = ["case", "forward ms", "backward ms", "both ms", "anchors/s", "pairs/s", "GFLOP/s", "of product"]
    head += ["GB/s", "of copy", "peak MiB", "active"]
    measured = [r for r in records if "both_ms" in r]
    rows = [[_name(r), *_throughput(r)] for r in measured]
    text = _aligned([head, *rows])
    staged = [r for r in measured if r["stages_ms"]]
    if staged:
        rows = [[_name(r), *(_number(r["stages_ms"].get(s)) for s in STAGES)] for r in staged]
        text += "\n\n" + _aligned([["stages, ms", *STAGES], *rows])
    for r in records:
        for why in ("skipped", "failed"):
            if why in r:
                text += f"\n{_name(r)}: {why}: {r[why]}"
    return text


def _name(r: Record) -> str:
    classes = f" K={r['per_class']}" if r["per_class"] else ""
    return f"{r['loss']} {r['distance']} N={r['rows']} D={r['dim']}{classes} {r['dtype']} {r['device']}"


def _throughput(r: Record) -> list[str]:
    return [
        *(_number(r[phase]["p50"]) for phase in ("forward_ms", "backward_ms", "both_ms")),
        _scaled(r["anchors_per_s"]),
        _scaled(r["pairs_per_s"]),
        _number(r["gflops"]),
        f"{r['share_of_product']:.0%}",
        _number(r["gb_per_s"]),
        f"{r['share_of_copy']:.0%}",
        _number(r["peak_bytes"] / 2**20),
        f"{r['active_fraction']:.0%}",
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _scaled(value: float) -> str:
    for unit, letter in UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:.3g}"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def write(records: Sequence[Record], peaks: Peaks, folder: Path) -> list[str]:
    """Writes profile.json, profile.csv and, if anything was measured, roofline.png; returns their names."""
    machine = {
        "deepsim_ext": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_kernels": build_info()["cpu_capability"],
        "system": platform.platform(),
    }
    found = {
        "machine": machine,
        "peaks": {
            "product_gflops": {" ".join(place): rate for place, rate in peaks.products.items()},
            "copy_gb_per_s": peaks.copies,
        },
        "records": list(records),
    }
    (folder / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
    flat = [_flat(r) for r in records]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    with (folder / "profile.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
    measured = [r for r in records if "both_ms" in r]
    if not measured:
        return ["profile.json", "profile.csv"]
    _roofline(measured, peaks, folder / "roofline.png")
    return ["profile.json", "profile.csv", "roofline.png"]


def _flat(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            row |= {f"{key.removesuffix('_ms')}_{part}_ms": v for part, v in value.items()}
        else:
            row[key] = value
    return row


def _roofline(records: Sequence[Record], peaks: Peaks, path: Path) -> None:
    """Rates of forward over the work's intensity, one panel for each device."""
    matplotlib.use("Agg")
    devices = list(dict.fromkeys(r["device"] for r in records))
    figure, axes = plt.subplots(
        1, len(devices), figsize=(7.5 * len(devices), 5), layout="constrained", squeeze=False
    )
    for axis, device in zip(axes[0], devices, strict=True):
        here = [r for r in records if r["device"] == device]
        intensity = [r["flops_per_byte"] for r in here]
        x = np.geomspace(min(1.0, *intensity) / 2, max(intensity) * 2, 200)
        roofs = {}
        for (where, dtype), gflops in peaks.products.items():
            if where == device:
                roofs.setdefault(round(gflops, 3), []).append(dtype)
        for gflops, dtypes in roofs.items():
            axis.plot(x, np.minimum(x * peaks.copies[device], gflops), color="0.4", linewidth=1)
            label = f"one product, {', '.join(dtypes)}: {gflops:.0f} GFLOP/s"
            axis.annotate(label, (x[-1], gflops), ha="right", va="bottom", fontsize=8, color="0.3")
        axis.annotate(
            f"one copy: {peaks.copies[device]:.0f} GB/s",
            (x[12], x[12] * peaks.copies[device]),
            fontsize=8,
            color="0.3",
            xytext=(8, -4),
            textcoords="offset points",
        )
        series = list(dict.fromkeys((r["loss"], r["distance"], r["dtype"], r["dim"]) for r in here))
        for k, key in enumerate(series):
            mine = [r for r in here if (r["loss"], r["distance"], r["dtype"], r["dim"]) == key]
            loss, distance, dtype, dim = key
            axis.plot(
                [r["flops_per_byte"] for r in mine],
                [r["gflops"] for r in mine],
                marker=MARKERS[dtype],
                color=f"C{k % 10}",
                linestyle=":",
                label=f"{loss} {distance} D={dim} {dtype}",
            )
            for r in mine:
                axis.annotate(
                    str(r["rows"]),
                    (r["flops_per_byte"], r["gflops"]),
                    fontsize=7,
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="FLOP per byte that the work needs",
            ylabel="GFLOP/s of forward (numbers: rows N)",
            title=f"mining on {device}",
        )
        axis.grid(alpha=0.3, which="both")
        axis.set_axisbelow(True)
    handles = {
        label: h for axis in axes[0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
