"""Everything that only a GPU can tell, in one command: `make gpu-check OUT=folder`.

Needs an NVIDIA GPU, nvcc, g++, torch, numpy, ninja and setuptools; pytest and hypothesis may be carried as
wheels in a folder `wheels/`. No network, no virtual environment. Every step has a time limit, its output in
log.txt and a line in summary.txt; a stop in the middle leaves what was done. Steps that measure no time run
beside each other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
# Programs check_<op>.cpp of tests/emulator.
CHECKS = ("all_pairs", "batch_hard", "gram", "given_rows", "pair_distances")
CHECK_FLAGS = ["-std=c++17", "-x", "cu", "-I.", "-Itests/emulator"]


def is_hopper() -> bool:
    """Whether the GPU that torch takes has wgmma."""
    program = "import torch; print(torch.cuda.get_device_capability()[0])"
    return subprocess.run([PYTHON, "-c", program], capture_output=True, text=True).stdout.strip() == "9"


def toolkit(program: str) -> str:
    """A program of the CUDA toolkit."""
    return shutil.which(program) or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{program}"


def pytest(processes: int, *arguments: str) -> list[str]:
    options = ["-v", "--maxfail=30", "--tb=short", "-p", "no:cacheprovider"]
    if processes > 1 and importlib.util.find_spec("xdist"):
        options += ["-n", str(processes)]
    return [PYTHON, "-m", "pytest", *options, *arguments]


Step = tuple[str, list[str], int]  # name, command, seconds allowed


def steps(folder: Path, scratch: Path) -> list[list[Step]]:
    """Groups of steps, in order of what is most worth knowing; those of a group run at the same time."""
    programs = {check: str(scratch / f"check_{check}") for check in (*CHECKS, "wrappers")}
    nvcc, sanitizer = toolkit("nvcc"), toolkit("compute-sanitizer")
    wheels = [str(w) for w in sorted((ROOT / "wheels").glob("*.whl"))]
    hopper = is_hopper()
    native = ["-gencode=arch=compute_90a,code=sm_90a", "-DDEEPSIM_SM_90A"] if hopper else ["-arch=native"]
    check_flags = ["-O2", *CHECK_FLAGS, *native]
    install = [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps"]
    install += ["--target", str(scratch / "packages")]
    suite = [f"tests/test_{name}.py" for name in ("batch_hard", "batch_hard_extremes", "gram", "style")]
    pairs = ["nearest_neighbors", "all_pairs", "mining_strategies", "triplet_margin", "contrastive"]
    pairs += ["given_rows", "pair_distances"]
    pairs = [f"tests/test_{name}.py" for name in pairs]
    # Values only: a redirected op is two for whoever counts ops, and its tensors are for whoever counts them.
    numbers = ["--on-cuda", "-k", "not gradcheck and not are_one_op and not bytes_a_row"]

    def sanitize(tool: str, check: str, what: str) -> Step:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", programs[check], "0", "1", what]
        return (f"{tool} {check}", command, 60)

    return [
        [("gpu", ["nvidia-smi"], 20)],
        *([[("wheels", [*install, *wheels], 60)]] if wheels else []),
        [
            ("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 250),
            *(
                (
                    f"build {check}",
                    [nvcc, *check_flags, f"tests/emulator/check_{check}.cpp", "-o", program],
                    150,
                )
                for check, program in programs.items()
            ),
        ],
        [
            ("info", [PYTHON, "-m", "deepsim_ext", "info"], 60),
            ("wrappers", [programs["wrappers"]], 30),
            *((check, [programs[check], "0", "3"], 60) for check in CHECKS),
        ],
        [
            ("suite", pytest(3, *numbers, *suite), 150),
            ("suite, mma", pytest(2, *numbers, suite[0]), 150),
            *([("suite, wgmma", pytest(2, *numbers, suite[0]), 150)] if hopper else []),
            ("pairs", pytest(8, *numbers, *pairs), 150),
            ("gpu only", pytest(1, "tests/test_cuda.py"), 150),
        ],
        [("stages", [PYTHON, "-m", "benchmarks.gpu_stages", str(folder)], 60)],
        [("benchmark", [PYTHON, "-m", "benchmarks.gpu", str(folder), "--seconds", "100"], 140)],
        [
            *(sanitize("memcheck", check, "float32") for check in CHECKS),
            # Not of wgmma: where one lane arrives on an mbarrier for its warp, the tool does not see that
            # what the other lanes have read before is read. With all lanes arriving it has no complaint.
            sanitize("racecheck", "batch_hard", "float32 mma"),
            *(sanitize("synccheck", check, "float32") for check in CHECKS),
        ],
    ]


_writing = threading.Lock()


def run(step: Step, deadline: float, log: Path, scratch: Path) -> dict[str, object]:
    """One step: what came of it, and its output at the end of the log."""
    name, command, limit = step
    start = time.monotonic()
    if deadline - start < 5:
        return {"step": name, "outcome": "not run: no time left", "seconds": 0, "last": ""}
    limit = min(limit, deadline - start)
    path = os.pathsep.join([str(ROOT), str(scratch / "packages"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"DEEPSIM_CUDA": "1", "PYTHONPATH": path}
    environment |= {
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }  # of each of the processes beside each other
    if name.startswith("suite, "):
        environment["DEEPSIM_CUDA_MINING"] = name.removeprefix("suite, ")
    output = scratch / f"{name}.output"
    with output.open("w") as out:
        try:
            # A group of its own: compilers and kernels that a step has started end with it.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            outcome = f"not run: {error.strerror}"
        else:
            try:
                status = process.wait(limit)
                outcome = "ok" if status == 0 else f"FAILED with exit code {status}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                outcome = f"STOPPED after {limit:.0f} s"
    text = output.read_text(errors="replace")
    with _writing, log.open("a") as whole:
        whole.write(f"==== {name}: {outcome}\n{text}\n")
    lines = text.splitlines()
    seconds = round(time.monotonic() - start, 1)
    return {"step": name, "outcome": outcome, "seconds": seconds, "last": lines[-1][:160] if lines else ""}


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu-check").resolve()
    if (
        shutil.which("nvidia-smi") is None
        or subprocess.run(["nvidia-smi"], capture_output=True).returncode != 0
    ):
        print("gpu-check: no NVIDIA GPU here")
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, object]] = []
    deadline = time.monotonic() + 530  # under nine minutes
    scratch = Path(tempfile.mkdtemp())
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    for group in steps(folder, scratch):
        with ThreadPoolExecutor(len(group)) as pool:
            results += pool.map(lambda step: run(step, deadline, log, scratch), group)
        summary = "\n".join("{step:22} {outcome:28} {seconds:6} s  {last}".format(**r) for r in results)
        (folder / "summary.txt").write_text(summary + "\n")
        (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(scratch)
    if (folder / "gpu.md").exists():
        print((folder / "gpu.md").read_text())
    print(summary)
    return 0 if all(r["outcome"] == "ok" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
