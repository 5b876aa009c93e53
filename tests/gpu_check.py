"""Everything that only a GPU can tell, in one command: `make gpu-check OUT=folder`.

Needs an NVIDIA GPU, nvcc, g++, torch, numpy, ninja and setuptools; pytest and hypothesis may be carried as
wheels in a folder `wheels/`. No network, no virtual environment. Every step has a time limit, its output in
log.txt and a line in summary.txt, written after each step: a stop in the middle leaves what was done.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
CHECK_FLAGS = ["-std=c++17", "-O2", "-x", "cu", "-I.", "-Itests/emulator"]


def is_hopper() -> bool:
    """Whether the GPU that torch takes has wgmma."""
    program = "import torch; print(torch.cuda.get_device_capability()[0])"
    return subprocess.run([PYTHON, "-c", program], capture_output=True, text=True).stdout.strip() == "9"


def toolkit(program: str) -> str:
    """A program of the CUDA toolkit."""
    return shutil.which(program) or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/{program}"


def pytest(*arguments: str) -> list[str]:
    options = ["-v", "--maxfail=30", "--tb=short", "-p", "no:cacheprovider"]
    return [PYTHON, "-m", "pytest", *options, *arguments]


def steps(folder: Path, scratch: Path) -> list[tuple[str, list[str], int]]:
    """Name, command and seconds allowed, in order of what is most worth knowing."""
    wrappers, kernels = str(scratch / "check_wrappers"), str(scratch / "check_kernels")
    nvcc, sanitizer = toolkit("nvcc"), toolkit("compute-sanitizer")
    wheels = [str(w) for w in sorted((ROOT / "wheels").glob("*.whl"))]
    hopper = is_hopper()
    native = ["-gencode=arch=compute_90a,code=sm_90a", "-DDEEPSIM_SM_90A"] if hopper else ["-arch=native"]
    check_flags = CHECK_FLAGS + native
    install = [PYTHON, "-m", "pip", "install", "--no-index", "--no-deps"]
    install += ["--target", str(scratch / "packages")]
    suite = ["tests/test_batch_hard.py", "tests/test_gram.py", "tests/test_style.py"]
    pairs = [f"tests/test_{name}.py" for name in ("nearest_neighbors", "all_pairs", "mining_strategies")]
    result = [
        ("gpu", ["nvidia-smi"], 20),
        *([("wheels", [*install, *wheels], 60)] if wheels else []),
        ("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 200),
        ("info", [PYTHON, "-m", "deepsim_ext", "info"], 60),
        ("build wrappers", [nvcc, *check_flags, "tests/emulator/check_wrappers.cpp", "-o", wrappers], 60),
        ("wrappers", [wrappers], 30),
        ("build kernels", [nvcc, *check_flags, "tests/emulator/check_kernels.cpp", "-o", kernels], 90),
        ("kernels", [kernels, "0", "3"], 60),
        ("suite", pytest("--on-cuda", *suite, "-k", "not gradcheck"), 150),
        ("suite, mma", pytest("--on-cuda", suite[0], "-k", "not gradcheck"), 60),
        *([("suite, wgmma", pytest("--on-cuda", suite[0], "-k", "not gradcheck"), 60)] if hopper else []),
        ("pairs", pytest("--on-cuda", *pairs, "-k", "not gradcheck"), 120),
        ("gpu only", pytest("tests/test_cuda.py"), 90),
        ("benchmark", [PYTHON, "-m", "benchmarks.gpu", str(folder), "--seconds", "150"], 220),
    ]
    result += [
        (tool, [sanitizer, "--tool", tool, "--error-exitcode", "1", kernels, "0", "1", "float32"], 60)
        for tool in ("memcheck", "racecheck", "synccheck")
    ]
    return result


def run(name: str, command: list[str], limit: float, log: Path, scratch: Path) -> dict[str, object]:
    """One step: what came of it, and its output at the end of the log."""
    path = os.pathsep.join([str(ROOT), str(scratch / "packages"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"DEEPSIM_CUDA": "1", "PYTHONPATH": path}
    if name.startswith("suite, "):
        environment["DEEPSIM_CUDA_MINING"] = name.removeprefix("suite, ")
    start = time.monotonic()
    output = scratch / "output"
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
    with log.open("a") as whole:
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
    for name, command, limit in steps(folder, scratch):
        left = deadline - time.monotonic()
        if left < 5:
            results.append({"step": name, "outcome": "not run: no time left", "seconds": 0, "last": ""})
            continue
        results.append(run(name, command, min(limit, left), log, scratch))
        summary = "\n".join("{step:16} {outcome:28} {seconds:6} s  {last}".format(**r) for r in results)
        (folder / "summary.txt").write_text(summary + "\n")
        (folder / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    shutil.rmtree(scratch)
    if (folder / "gpu.md").exists():
        print((folder / "gpu.md").read_text())
    print(summary)
    return 0 if all(r["outcome"] == "ok" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
