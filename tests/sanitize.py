"""CPU kernels and emulated CUDA kernels under ASan + UBSan and under TSan: `make sanitize`. Needs g++."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]

SANITIZERS = {
    "ASan + UBSan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "TSan": ["-fsanitize=thread"],
}
CPU_SOURCES = [
    "tests/check_cpu_kernels.cpp",
    *(f"csrc/cpu/simd/{capability}.cpp" for capability in ("portable", "avx2", "avx512")),
]
# Of the CUDA kernels, the longest first.
CHECKS = ("all_pairs", "batch_hard", "gram", "given_rows", "pair_distances")
# Sources and arguments by what is checked. TSan takes minutes for every dtype, which differ in nothing that
# it looks at; in 16 bits there are fewest products.
PROGRAMS = {
    ("CPU kernels", "ASan + UBSan"): (CPU_SOURCES, []),
    ("CPU kernels", "TSan"): (CPU_SOURCES, []),
}
for check in CHECKS:
    sources = [f"tests/emulator/check_{check}.cpp"]
    PROGRAMS[f"CUDA kernels of {check}", "ASan + UBSan"] = sources, ["0", "1"]
    PROGRAMS[f"CUDA kernels of {check}", "TSan"] = sources, ["1", "1", "bfloat16"]


def build(sanitizer: str, sources: list[str], program: Path) -> subprocess.CompletedProcess[str]:
    # The CPU kernels take a minute to build and seconds to run; what is emulated runs longer than it builds.
    flags = [
        "-std=c++17",
        "-O0" if sources == CPU_SOURCES else "-Og",
        "-g",
        "-pthread",
        "-Wno-psabi",
        "-Wno-unknown-pragmas",
        *SANITIZERS[sanitizer],
    ]
    includes = [f"-I{ROOT}", f"-I{ROOT / 'tests' / 'emulator'}"]
    command = ["g++", *flags, *includes, *sources, "-o", str(program)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def run(sanitizer: str, program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # TSan has places of its own for memory, which some kernels' randomised ones overlap.
    prefix = ["setarch", "-R"] if sanitizer == "TSan" and shutil.which("setarch") else []
    return subprocess.run([*prefix, str(program), *arguments], capture_output=True, text=True)


def check(name: tuple[str, str], folder: Path) -> tuple[bool, str]:
    """Builds and runs one program: whether it found nothing, and what it said."""
    sources, arguments = PROGRAMS[name]
    _, sanitizer = name
    program = folder / "-".join(name).replace(" ", "")
    built = build(sanitizer, sources, program)
    if built.returncode != 0:
        return False, built.stderr
    process = run(sanitizer, program, *arguments)
    return process.returncode == 0, process.stdout + process.stderr


def main() -> int:
    """Prints a line for each program, and what was found."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda name: check(name, Path(folder)), PROGRAMS))
    for (kernels, sanitizer), (clean, output) in zip(PROGRAMS, results, strict=True):
        print(f"sanitize: {kernels} under {sanitizer}: {'clean' if clean else 'NOT CLEAN'}")
        if not clean:
            print(output)
    return 0 if all(clean for clean, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
