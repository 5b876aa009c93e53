"""Peak extra memory of one call, measured in a fresh process.

The figure is the high-water mark of the resident set during the call minus the resident set just before it,
after a tiny warm-up call that loads the libraries. The input is resident before and does not count;
everything that the call allocates does: the result, the gradient, packed copies, and the workspaces that a
BLAS allocates for this size. On Linux the mark (VmHWM) is reset just before the call; elsewhere the growth of
ru_maxrss stands in, which misses what an earlier peak hides.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

from deepsim_ext._memory import peak_of_call

from .timing import Contender, Record

ROOT = Path(__file__).resolve().parent.parent


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
    print(json.dumps(peak_of_call(measured, warm_up)))
