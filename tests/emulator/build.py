"""Builds deepsim_ext._C with the CUDA kernels in place of the CPU's, run by the emulator."""

from __future__ import annotations

import sys
from pathlib import Path

from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]


def load() -> None:
    """Makes `import deepsim_ext` find the emulated module; builds it first if a source has changed."""
    directory = ROOT / "build" / "emulator"
    directory.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "tests" / "emulator" / "module.cpp"]
    sources += sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    sources.remove(ROOT / "csrc" / "module.cpp")  # part of tests/emulator/module.cpp
    sys.modules["deepsim_ext._C"] = cpp_extension.load(
        "_C",
        [str(s) for s in sources],
        build_directory=str(directory),
        extra_include_paths=[str(ROOT / "tests" / "emulator")],
        extra_cflags=["-O2", "-DDEEPSIM_EMULATED", "-Wno-psabi"],
    )
