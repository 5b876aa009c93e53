"""Peak extra memory of one call, measured in a fresh process.

The figure is the high-water mark of the resident set during the call minus the resident set just before it,
after a tiny warm-up call that loads the libraries. The input is resident before and does not count;
everything that the call allocates does: the result, the gradient, packed copies, and the workspaces that a
BLAS allocates for this size. On Linux the mark (VmHWM) is reset just before the call; elsewhere the growth of
ru_maxrss stands in, which misses what an earlier peak hides.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .timing import Contender, Record

ROOT = Path(__file__).resolve().parent.parent


def _status_bytes(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def _max_rss() -> int:
    # KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of_call(call: Callable[[], object]) -> int:
    """Bytes by which the resident set of this process grows at most while `call` runs."""
    gc.collect()
    # Free memory that glibc keeps resident would serve the call unseen.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        before = _max_rss()
        call()
        return _max_rss() - before
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


def peak_in_subprocess(probe: str, *arguments: str | int) -> int:
    """Peak extra bytes of a call in a new process.

    probe: "module:function"; the function gets `arguments` as strings and returns the call to measure and a
    tiny warm-up call. Raises RuntimeError with the process's last line of error output if it fails.
    """
    command = [sys.executable, "-m", "benchmarks.memory", probe, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit status {process.returncode}"]
        raise RuntimeError(f"{probe}: {lines[-1]}")
    return json.loads(process.stdout.splitlines()[-1])


def memory_record(contender: Contender, accounted: int, probe: str, *arguments: str | int) -> Record:
    """The contender's peak, and what of it goes beyond `accounted` bytes, or why it has none."""
    record: Record = {"contender": contender.name}
    if contender.skip:
        return record | {"skipped": contender.skip}
    try:
        peak = peak_in_subprocess(probe, *arguments)
    except RuntimeError as error:
        return record | {"skipped": f"failed with {error}"}
    return record | {"peak_bytes": peak, "beyond_bytes": max(peak - accounted, 0)}


if __name__ == "__main__":
    module, function = sys.argv[1].split(":")
    measured, warm_up = getattr(importlib.import_module(module), function)(*sys.argv[2:])
    warm_up()
    print(json.dumps(peak_of_call(measured)))
