"""One case after another: times, stages, memory and the machine's own peaks.

Rates count what the work needs, the same for every loss: N^2 D FLOPs (half of the symmetric product of all
pairs) in forward, and in bytes one reading of the embeddings and of their packed copy, the writing of that
copy, and for the gradient another reading of the embeddings and its writing. Peaks are the best that one
large product and one large copy reach on the same machine in the same run; on the CPU 16-bit embeddings are
multiplied in float32, so that is their peak.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import functional
from .._memory import peak_of_call
from ..demo import torch_versions

Record = dict[str, Any]

TRIPLET_LOSSES: dict[str, Callable[..., Any]] = {
    "batch_hard": functional.batch_hard_triplet_loss,
    "batch_hard_soft": partial(functional.batch_hard_triplet_loss, soft=True),
    "semi_hard": functional.batch_semi_hard_triplet_loss,
    "batch_all": functional.batch_all_triplet_loss,
}
# As the kernels name them, in their order.
STAGES = ("sort", "centre", "pack", "positives", "tiles", "recompute", "gradient", "backward")
ROTATED = 3  # random inputs, so that no run finds its own in the cache because the last one left it there
FEWEST_RUNS, MOST_RUNS, PROFILED_RUNS = 3, 200, 3
PRODUCT_SIDE, COPY_BYTES = 2048, 2**28
# Bytes for each pair that the torch version holds at its peak.
EAGER_PAIR_BYTES = 40


@dataclass(frozen=True)
class Case:
    """What one record is about; per_class is 0 for labels that were given."""

    device: str
    loss: str
    distance: str
    dtype: str
    dim: int
    rows: int
    per_class: int

    def __str__(self) -> str:
        return f"{self.loss} N={self.rows} D={self.dim} {self.dtype} {self.device}"


class Batch(NamedTuple):
    """Embeddings [N, D] and labels int64 [N]."""

    embeddings: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Peaks:
    """GFLOP/s by device and dtype, GB/s by device."""

    products: dict[tuple[str, str], float]
    copies: dict[str, float]


# ---- input -------------------------------------------------------------------------------------------------


def load(embeddings: Path | None, labels: Path | None) -> Batch | None:
    """The batch in two .npy files, None if none are given; ValueError says what is wrong with them."""
    if embeddings is None and labels is None:
        return None
    if embeddings is None or labels is None:
        raise ValueError("--embeddings and --labels go together, got only one of them")
    x, y = _array(embeddings), _array(labels)
    if x.ndim != 2 or x.size == 0 or x.dtype.kind != "f":
        expected = "floating point of shape [N, D] with N, D >= 1"
        raise ValueError(f"{embeddings}: expected {expected}, got {x.dtype} {list(x.shape)}")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise ValueError(
            f"{labels}: expected integers of shape [{x.shape[0]}], got {y.dtype} {list(y.shape)}"
        )
    return Batch(torch.from_numpy(x.astype(np.float64)), torch.from_numpy(y.astype(np.int64)))


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no array that NumPy can read: {error}") from None


def check_device(name: str) -> None:
    """ValueError unless it is a CPU or a CUDA device on which torch can allocate."""
    try:
        kind = torch.empty(1, device=name).device.type
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name}: {_one_line(error)}") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {name}: expected cpu or cuda")


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def draw(case: Case, own: Batch | None) -> Batch:
    """Normal embeddings with labels in random order, or the batch that was given."""
    if own is None:
        x = torch.randn(case.rows, case.dim)
        own = Batch(x, torch.arange(case.rows)[torch.randperm(case.rows)] // case.per_class)
    x = own.embeddings.to(case.device, getattr(torch, case.dtype))
    return Batch(x.detach().requires_grad_(case.loss != "mine"), own.labels.to(case.device))


# ---- clocks ------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def peaks(places: Iterable[tuple[str, str]]) -> Peaks:
    """The best of a few products and copies, on every device and in every dtype that occurs."""
    products, copies = {}, {}
    for device, dtype in sorted(places):
        a = torch.randn(
            PRODUCT_SIDE, PRODUCT_SIDE, device=device, dtype=getattr(torch, _peak_dtype(device, dtype))
        )
        best = min(seconds_of(lambda a=a: torch.mm(a, a), device) for _ in range(5))
        products[device, dtype] = 2 * PRODUCT_SIDE**3 / best / 1e9
        if device not in copies:
            source = torch.randn(COPY_BYTES // 4, device=device)
            target = torch.empty_like(source)
            best = min(seconds_of(lambda s=source, t=target: t.copy_(s), device) for _ in range(5))
            copies[device] = 2 * COPY_BYTES / best / 1e9
    return Peaks(products, copies)


def _peak_dtype(device: str, dtype: str) -> str:
    return dtype if is_cuda(device) or dtype == "float64" else "float32"


# ---- one case ----------------------------------------------------------------------------------------------


def forward_of(case: Case, margin: float) -> Callable[[Batch], Any]:
    """The call to profile."""
    if case.loss == "mine":
        return lambda b: functional.batch_hard_mine(*b, distance=case.distance)
    if case.loss == "torch_eager":
        return lambda b: torch_versions.batch_hard_triplet_loss(*b, margin)
    loss = TRIPLET_LOSSES[case.loss]
    return lambda b: loss(*b, margin=margin, distance=case.distance)


def reason_to_skip(case: Case) -> str:
    if case.loss != "torch_eager":
        return ""
    if case.distance != "euclidean":
        return "the torch version is for Euclidean distances"
    needed, available = EAGER_PAIR_BYTES * case.rows**2, _available_bytes(case.device)
    if needed < 0.8 * available:
        return ""
    return f"needs about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"


def _available_bytes(device: str) -> float:
    if is_cuda(device):
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    return 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0])


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def profile(case: Case, own: Batch | None, *, margin: float, seconds: float, peaks: Peaks) -> Record:
    """Everything about one case; "skipped" or "failed" says why there is nothing."""
    record = asdict(case)
    skip = reason_to_skip(case)
    if skip:
        return record | {"skipped": skip}
    try:
        return record | _profile(case, own, margin, seconds, peaks)
    except (RuntimeError, MemoryError) as error:
        return record | {"failed": _one_line(error)}


def _profile(case: Case, own: Batch | None, margin: float, seconds: float, peaks: Peaks) -> Record:
    forward = forward_of(case, margin)
    batches = [draw(case, own) for _ in range(ROTATED if own is None else 1)]
    times = _times(forward, batches, case, seconds)
    total = times["both_ms"]["p50"] / 1e3
    itemsize = batches[0].embeddings.element_size()
    packed = itemsize if is_cuda(case.device) else max(4, itemsize)
    forward_bytes = case.rows * case.dim * (itemsize + 2 * packed)
    backward_bytes = 0 if case.loss == "mine" else case.rows * case.dim * 2 * itemsize
    flops = case.rows**2 * case.dim
    gflops = flops / times["forward_ms"]["p50"] / 1e6
    gbs = (forward_bytes + backward_bytes) / total / 1e9
    return {
        **times,
        "anchors_per_s": case.rows / total,
        "pairs_per_s": case.rows**2 / total,
        "gflops": gflops,
        "share_of_product": gflops / peaks.products[case.device, case.dtype],
        "gb_per_s": gbs,
        "share_of_copy": gbs / peaks.copies[case.device],
        "flops_per_byte": flops / forward_bytes,
        "stages_ms": _stages(forward, batches, case),
        "peak_bytes": _peak_bytes(forward, batches[0], case),
        **_statistics(batches[0], case, margin),
    }


def _times(forward: Callable[[Batch], Any], batches: list[Batch], case: Case, seconds: float) -> Record:
    found: dict[str, list[float]] = {"forward_ms": [], "backward_ms": [], "both_ms": []}

    def run(batch: Batch) -> Iterator[float]:
        kept: list[Any] = []
        yield seconds_of(lambda: kept.append(forward(batch)), case.device)
        yield (
            0.0
            if case.loss == "mine"
            else seconds_of(lambda: torch.autograd.grad(kept[0], batch.embeddings), case.device)
        )

    for batch in batches:
        list(run(batch))
    deadline, runs = time.perf_counter() + seconds, 0
    while runs < FEWEST_RUNS or (runs < MOST_RUNS and time.perf_counter() < deadline):
        first, second = run(batches[runs % len(batches)])
        for name, value in zip(found, (first, second, first + second), strict=True):
            found[name].append(1e3 * value)
        runs += 1
    percentiles = {
        name: dict(zip(("p20", "p50", "p80"), map(float, np.percentile(values, (20, 50, 80))), strict=True))
        for name, values in found.items()
    }
    return {"runs": runs, **percentiles}


def _step(forward: Callable[[Batch], Any], batch: Batch, case: Case) -> None:
    result = forward(batch)
    if case.loss != "mine":
        torch.autograd.grad(result, batch.embeddings)


def _profiler(case: Case) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if is_cuda(case.device):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    else:
        # Or it tells stderr of its start and stop, at a level above its errors, of which a CPU has none.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return torch.profiler.profile(activities=activities)


def _stages(forward: Callable[[Batch], Any], batches: list[Batch], case: Case) -> dict[str, float]:
    """Milliseconds by stage, of those that the loss has: on a GPU from the first kernel to the last."""
    with _profiler(case) as profiler:
        for i in range(PROFILED_RUNS):
            _step(forward, batches[i % len(batches)], case)
        synchronize(case.device)
    device = torch.autograd.DeviceType.CUDA if is_cuda(case.device) else torch.autograd.DeviceType.CPU
    events = [e for e in profiler.key_averages() if e.device_type == device]
    total = {e.key: e.device_time_total if is_cuda(case.device) else e.cpu_time_total for e in events}
    found = {s: total.get(f"deepsim_ext::{s}", 0.0) / PROFILED_RUNS / 1e3 for s in STAGES}
    return {stage: milliseconds for stage, milliseconds in found.items() if milliseconds > 0}


def _peak_bytes(forward: Callable[[Batch], Any], batch: Batch, case: Case) -> int:
    """Beyond the input; gradient included."""
    if is_cuda(case.device):
        synchronize(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        _step(forward, batch, case)
        synchronize(case.device)
        return torch.cuda.max_memory_allocated(case.device) - before
    small = Batch(batch.embeddings[:8].detach().requires_grad_(case.loss != "mine"), batch.labels[:8])
    return peak_of_call(lambda: _step(forward, batch, case), lambda: _step(forward, small, case))


def _statistics(batch: Batch, case: Case, margin: float) -> Record:
    loss = TRIPLET_LOSSES.get(case.loss, TRIPLET_LOSSES["batch_hard"])
    x = batch.embeddings.detach()
    result = loss(x, batch.labels, margin=margin, distance=case.distance, return_stats=True)
    return {
        "loss_value": float(result.loss),
        "valid_anchors": int(result.valid_anchors),
        "active_fraction": float(result.active_fraction),
    }


def trace(case: Case, own: Batch | None, *, margin: float, path: Path) -> None:
    """A few steps of one case, which has run, as a Chrome trace; the stages are ranges in it."""
    forward, batch = forward_of(case, margin), draw(case, own)
    _step(forward, batch, case)
    with _profiler(case) as profiler:
        for _ in range(PROFILED_RUNS):
            with torch.profiler.record_function("step"):
                _step(forward, batch, case)
        synchronize(case.device)
    profiler.export_chrome_trace(str(path))
