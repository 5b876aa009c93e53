"""Builds deepsim_ext._C from csrc/ against the installed torch.

DEEPSIM_CUDA=auto (default) builds CUDA kernels where there are any and nvcc is found, 0 leaves them out, 1
makes their absence an error. This version has none yet.
"""

from __future__ import annotations

import os
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "deepsim_ext builds against the torch that is installed, and none is. Install torch, then run\n"
        "    pip install --no-build-isolation ."
    )


def why_no_cuda() -> str:
    """The reason for building without CUDA kernels; exits where DEEPSIM_CUDA=1 asks for them all the same."""
    wish = os.environ.get("DEEPSIM_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"deepsim_ext: DEEPSIM_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return "DEEPSIM_CUDA=0"
    nvcc = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    found = (nvcc and nvcc.exists()) or shutil.which("nvcc")
    reason = "this version has no CUDA kernels yet" if found else "nvcc was not found (set CUDA_HOME or PATH)"
    if wish == "1":
        sys.exit(f"deepsim_ext: DEEPSIM_CUDA=1, but {reason}")
    return reason


print(f"deepsim_ext: building CPU kernels only: {why_no_cuda()}", file=sys.stderr)

openmp = ["-fopenmp"] if sys.platform == "linux" else []
setup(
    ext_modules=[
        CppExtension(
            "deepsim_ext._C",
            sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
            extra_compile_args=["-O3", "-fvisibility=hidden", "-Wno-psabi", *openmp],
            extra_link_args=openmp,
            define_macros=[("DEEPSIM_CUDA_ARCHITECTURES", '""')],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
