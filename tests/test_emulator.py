"""The CUDA kernels under the emulator's schedules, and what it finds in kernels with a planted bug."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCHEDULES = 6


def build(root: Path, program: Path, *options: str, source: str = "check_kernels.cpp") -> Path:
    """A source of tests/emulator as a program, from the files under `root`."""
    flags = ["-std=c++17", "-g", "-Wno-psabi", "-Wno-unknown-pragmas", "-pthread", *options]
    includes = [f"-I{root}", f"-I{root / 'tests' / 'emulator'}"]
    subprocess.run(
        ["g++", *flags, *includes, str(root / "tests" / "emulator" / source), "-o", str(program)], check=True
    )
    return program


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_wrappers_do_what_they_say(tmp_path):
    """Of the hardware's instructions; `make gpu-check` asks a GPU the same."""
    process = run(build(ROOT, tmp_path / "check", source="check_wrappers.cpp"))
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("right: ") == 11
    assert "WRONG" not in process.stdout


@pytest.mark.slow
def test_every_kernel_is_right_under_every_schedule(tmp_path):
    """All dtypes and forms, copies that land late and at once."""
    process = run(build(ROOT, tmp_path / "check", "-O2"), 0, SCHEDULES)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout == f"0 wrong in {SCHEDULES} seeds\n"


BARRIER = "    __syncthreads();  // this chunk is there for all, and nobody needs the one before\n"
WAIT = "    ptx::cp_async_wait<kStages - 2>();\n"
REFILL = "    load(chunk + kStages - 1);\n"
DESCRIPTION = "  shared.half_norm[side][r] = set.half_norm[position];\n"
IN_ROWS = "    __syncwarp();  // keeps"
TWO_BARRIERS = (
    "    if (threadIdx.x < 200) {\n      __syncthreads();\n    } else {\n      __syncthreads();\n    }\n"
)

# A piece of csrc/cuda/mine_tiles.cuh, what is put in its place, and what the emulator has to say then.
PLANTED = {
    "missing_barrier": (BARRIER, "", "wrong: "),
    "missing_wait": (WAIT, "", "wrong: "),
    "early_refill": (BARRIER + REFILL, REFILL + BARRIER, "wrong: "),
    "different_barriers": (BARRIER, TWO_BARRIERS, "divergent __syncthreads"),
    "barrier_of_some": (BARRIER, "    if (threadIdx.x < 200) __syncthreads();\n", "deadlock: "),
    "warp_operation_of_some": (IN_ROWS, IN_ROWS.replace("__", "if (lane < 16) __"), "divergent warp"),
    "read_beyond_global_memory": (
        DESCRIPTION,
        DESCRIPTION.replace("position]", "position + kTileRows]"),
        "heap-buffer-overflow",
    ),
    "write_beyond_shared_memory": (
        DESCRIPTION,
        DESCRIPTION.replace("[side][r]", "[side][r + 8 * kTileRows]"),
        "use-after-poison",
    ),
}


def report_of(bug: str, folder: Path) -> str:
    """What comes of a planted bug: nothing is to be said for it if the program says all is right."""
    before, after, report = PLANTED[bug]
    for part in ("csrc", "tests/emulator"):
        shutil.copytree(ROOT / part, folder / part)
    source = folder / "csrc" / "cuda" / "mine_tiles.cuh"
    text = source.read_text()
    assert text.count(before) == 1, bug
    source.write_text(text.replace(before, after))
    options = ["-O1", "-fsanitize=address"] if "beyond" in bug else ["-O1"]
    process = run(build(folder, folder / "check", *options), 0, SCHEDULES, "float32")
    return "right" if process.returncode == 0 else process.stdout + process.stderr


@pytest.mark.slow
def test_planted_bugs_are_found(tmp_path):
    with ThreadPoolExecutor() as pool:
        reports = pool.map(report_of, PLANTED, (tmp_path / bug for bug in PLANTED))
        for (bug, (*_, expected)), report in zip(PLANTED.items(), reports, strict=True):
            assert expected in report, bug
