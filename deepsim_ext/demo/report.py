"""What the parts of the demo hand in, how their losses are timed, and the table at the end."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

Loss = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table: median time and peak extra memory of one forward and backward."""

    replaced: str
    input: str
    milliseconds: float
    torch_milliseconds: float
    peak_bytes: int
    torch_peak_bytes: int
    agreement: str

    @property
    def speedup(self) -> float:
        return self.torch_milliseconds / self.milliseconds


@dataclass(frozen=True)
class Check:
    """A condition that the demo stands or falls with."""

    name: str
    value: float
    limit: float
    at_least: bool = False  # otherwise: at most

    @property
    def passed(self) -> bool:
        # a NaN fails either way
        return bool(self.value >= self.limit if self.at_least else self.value <= self.limit)

    def __str__(self) -> str:
        return (
            f"{'ok    ' if self.passed else 'FAILED'} {self.name}: {self.value:.3g}"
            f" (at {'least' if self.at_least else 'most'} {self.limit:g})"
        )


@dataclass
class Part:
    """Outcome of one part of the demo: `tables` in Markdown, `figures` by file name in the output folder."""

    title: str
    rows: list[Row] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def timed_loss(loss_function: Loss, inputs: Sequence[Tensor]) -> tuple[float, tuple[Tensor, ...], float]:
    """Loss of the inputs cut off from their graph, its gradients there, and the milliseconds of both."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    start = time.perf_counter()
    loss = loss_function(leaves)
    gradients = torch.autograd.grad(loss, leaves)
    milliseconds = 1e3 * (time.perf_counter() - start)
    return loss.item(), gradients, milliseconds


class MeasuredLoss:
    """A loss with a record of its calls, beside another version of it that gets the same inputs each time."""

    def __init__(
        self, function: Callable[..., Tensor], compared_with: Callable[..., Tensor] | None = None
    ) -> None:
        self.function = function
        self.compared_with = compared_with
        self.values: list[float] = []
        self.expected_values: list[float] = []  # of `compared_with`
        self.gradient_differences: list[float] = []  # relative, in the Euclidean norm
        self.milliseconds: list[float] = []
        self.expected_milliseconds: list[float] = []

    def __call__(
        self, inputs: Sequence[Tensor], call: Callable[[Callable[..., Tensor], list[Tensor]], Tensor]
    ) -> tuple[float, tuple[Tensor, ...]]:
        """The loss of `inputs` and its gradients; `call` hands a version of the loss its arguments."""
        value, gradients, milliseconds = timed_loss(lambda xs: call(self.function, xs), inputs)
        self.values.append(value)
        self.milliseconds.append(milliseconds)
        if self.compared_with:
            other = self.compared_with
            expected, expected_gradients, milliseconds = timed_loss(lambda xs: call(other, xs), inputs)
            self.expected_values.append(expected)
            self.expected_milliseconds.append(milliseconds)
            self.gradient_differences.append(gradient_difference(gradients, expected_gradients))
        return value, gradients


def gradient_difference(gradients: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """||a - b|| / ||b|| over all tensors together."""
    apart = sum((a - b).square().sum() for a, b in zip(gradients, expected, strict=True))
    return (apart / sum(b.square().sum() for b in expected)).sqrt().item()


def median_milliseconds(
    loss_functions: Sequence[Loss], inputs: Sequence[Tensor], repeats: int
) -> list[float]:
    """Median time of each loss, forward and backward; they take turns, so that load hits all alike."""
    times: list[list[float]] = [[] for _ in loss_functions]
    for turn in range(repeats + 1):
        for loss_function, record in zip(loss_functions, times, strict=True):
            milliseconds = timed_loss(loss_function, inputs)[2]
            if turn:
                record.append(milliseconds)
    return [median(record) for record in times]


def relative_differences(values: Sequence[float], expected: Sequence[float]) -> np.ndarray:
    """|a - b| / |b|, value by value; a NaN stays one."""
    return np.abs(np.subtract(values, expected)) / np.abs(expected)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    cells = [["replaced", "input", "ms", "torch ms", "speed-up", "MiB", "torch MiB", "agreement"]]
    for row in rows:
        times = [f"{row.milliseconds:.2f}", f"{row.torch_milliseconds:.2f}", f"{row.speedup:.1f}x"]
        memory = [f"{peak / 2**20:.1f}" for peak in (row.peak_bytes, row.torch_peak_bytes)]
        cells.append([row.replaced, row.input, *times, *memory, row.agreement])
    return markdown_table(cells, numeric=range(2, 7))


def markdown_table(cells: Sequence[Sequence[str]], numeric: Collection[int]) -> str:
    """Header and lines as a Markdown table whose columns line up, for a terminal as well.

    numeric: the columns that stand on the right.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * (w - 1) + ":" if i in numeric else "-" * w for i, w in enumerate(widths)]
    lines = []
    for line in [cells[0], rule, *cells[1:]]:
        padded = [
            c.rjust(w) if i in numeric else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("| " + " | ".join(padded) + " |")
    return "\n".join(lines)


def machine() -> str:
    """What the times depend on, in a line."""
    threads = torch.get_num_threads()
    return f"torch {torch.__version__}, {threads} threads, {platform.machine()}, {platform.system()}"


def write(parts: Sequence[Part], output: Path) -> str:
    """Writes report.md and report.json into `output`; returns the text for the terminal."""
    rows = [row for part in parts for row in part.rows]
    checks = [check for part in parts for check in part.checks]
    note = "ms: forward and backward, median; MiB: peak extra memory of one, beyond the inputs."
    summary = "\n".join([table(rows), "", note]) if rows else ""
    sections = []
    for part in parts:
        pictures = [f"![{name}]({name})" for name in part.figures]
        sections.append(
            "\n\n".join(
                [f"## {part.title}", *part.tables, "\n".join(f"- {c}" for c in part.checks), *pictures]
            )
        )
    heading = ["# deepsim_ext demo", f"Measured with {machine()}."]
    text = "\n\n".join(filter(None, [*heading, summary, *sections]))
    (output / "report.md").write_text(text + "\n")
    record = {
        "machine": machine(),
        "passed": all(check.passed for check in checks),
        "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "numbers": {part.title: part.numbers for part in parts},
        "figures": [name for part in parts for name in part.figures],
    }
    (output / "report.json").write_text(json.dumps(record, indent=2) + "\n")
    tables = [text for part in parts for text in part.tables]
    return "\n\n".join(filter(None, [summary, *tables, "\n".join(map(str, checks))]))
