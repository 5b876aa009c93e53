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
    sources = sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc" / "cuda").glob("*.cpp"))
    sources.remove(ROOT / "csrc" / "module.cpp")  # part of tests/emulator/module.cpp
    # As setup.py does it: torch's headers are compiled once for all of these.
    torch_side = directory / "torch_side.cpp"
    text = "".join(f'#include "{source}"\n' for source in sources)
    if not torch_side.exists() or torch_side.read_text() != text:
        torch_side.write_text(text)
    sys.modules["deepsim_ext._C"] = cpp_extension.load(
        "_C",
        [str(ROOT / "tests" / "emulator" / "module.cpp"), str(torch_side)],
        build_directory=str(directory),
        extra_include_paths=[str(ROOT / "tests" / "emulator")],
        extra_cflags=["-O2", "-DDEEPSIM_EMULATED", "-Wno-psabi"],
    )
