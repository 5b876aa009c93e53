"""`python -m benchmarks.instructions`: instructions that the two main CPU kernels execute in a small case.

Counted by valgrind's callgrind, so the same whatever else the machine does, for one compiler. Writes
results/instructions.json, with the instructions for each multiplication. Needs g++ and valgrind.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).parent / "results" / "instructions.json"
# Multiplications of the upper triangle of tiles of 24 rows (AVX2): tiles x 24 x 24 x depth. In a tile on the
# diagonal of the Gram matrix only 8 rows have all 24 columns, 8 have 16 and 8 have 8.
MULTIPLICATIONS = {
    "mine": 8 * 9 // 2 * 24 * 24 * 128,
    "gram": (4 * 3 // 2 * 24 * 24 + 4 * 8 * (24 + 16 + 8)) * 1024,
}


def count(program: Path, what: str) -> int:
    """Instructions of the whole program."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out", str(program), what]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"Collected : (\d+)", process.stderr)[1])


def missing_tools() -> list[str]:
    return [tool for tool in ("g++", "valgrind") if shutil.which(tool) is None]


def measure() -> dict[str, Any]:
    """The compiler, and by kernel its instructions in all and for each multiplication."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "instructions")
        sources = ["benchmarks/instructions.cpp", "csrc/cpu/simd/avx2.cpp"]
        options = ["-std=c++17", "-O3", "-g", "-Wno-psabi", "-I."]
        subprocess.run(["g++", *options, *sources, "-o", str(program)], cwd=ROOT, check=True)
        base = count(program, "nothing")
        counts = {what: count(program, what) - base for what in MULTIPLICATIONS}
    version = subprocess.run(
        ["g++", "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    found = {"compiler": version, "kernels": "avx2"}
    for what, instructions in counts.items():
        per = instructions / MULTIPLICATIONS[what]
        found[what] = {"instructions": instructions, "per_multiplication": round(per, 4)}
    return found


def main() -> int:
    if missing := missing_tools():
        print(f"instructions: {', '.join(missing)} not found")
        return 2
    found = measure()
    for what in MULTIPLICATIONS:
        instructions, per = found[what].values()
        print(f"{what}: {instructions} instructions, {per:.4f} for each multiplication (one FMA has eight)")
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
