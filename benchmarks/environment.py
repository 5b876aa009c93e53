"""Where and with what a benchmark ran."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import deepsim_ext


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, str | int | float]:
    """Machine, versions, commit, date and load, as they are now."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "cpu_kernels": deepsim_ext.build_info()["cpu_capability"],
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND", "not set"),
        "malloc_mmap_max": os.environ.get("MALLOC_MMAP_MAX_", "not set"),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepsim_ext": deepsim_ext.__version__,
        "pytorch_metric_learning": _version("pytorch-metric-learning"),
        "sentence_transformers": _version("sentence-transformers"),
        "system": platform.platform(),
        "commit": _git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
