"""Builds deepsim_ext._C from csrc/ against the installed torch.

DEEPSIM_CUDA=auto (default) builds the CUDA kernels where nvcc is found, whether or not this torch or machine
can run them; 0 leaves them out; 1 makes a missing nvcc an error. TORCH_CUDA_ARCH_LIST names other GPUs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    sys.exit(
        "deepsim_ext builds against the torch that is installed, and there is none here: there never is in\n"
        "pip's build isolation. With torch installed, run\n"
        "    pip install --no-build-isolation ."
    )

# Ampere and Hopper by name; the PTX is compiled by the driver of whatever is newer.
ARCHITECTURES = "8.0 9.0a 8.0+PTX"


def find_nvcc() -> str | None:
    """The nvcc to build with. None: no CUDA kernels, for a reason that is printed."""
    wish = os.environ.get("DEEPSIM_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"deepsim_ext: DEEPSIM_CUDA must be auto, 0 or 1, got {wish!r}")
    at_home = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None
    found = str(at_home) if at_home and at_home.exists() else shutil.which("nvcc")
    if wish != "0" and found:
        return found
    if wish == "1":
        sys.exit("deepsim_ext: DEEPSIM_CUDA=1, but nvcc was not found (set CUDA_HOME or PATH)")
    reason = "DEEPSIM_CUDA=0" if wish == "0" else "nvcc was not found (set CUDA_HOME or PATH)"
    print(f"deepsim_ext: building CPU kernels only: {reason}", file=sys.stderr)
    return None


def cuda_runtime(nvcc: str) -> str:
    """The static CUDA runtime of nvcc's toolkit, wherever distributions keep it."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    for folder in ("lib64", "lib", "targets/*/lib"):
        for library in sorted(glob(f"{top[1]}/{folder}/libcudart_static.a")) if top else ():
            return library
    sys.exit(f"deepsim_ext: no libcudart_static.a beside {nvcc}; DEEPSIM_CUDA=0 builds without CUDA kernels")


def shared_standard_library() -> list[str]:
    """libstdc++.so.6 by name, where the linker finds it.

    There are g++ that link a copy of their own into everything. Beside the one that torch brings, streams do
    not work then: the words of an error are cut off, or the process crashes.
    """
    option = "-l:libstdc++.so.6"
    compiler = shlex.split(get_cxx_compiler())
    if sys.platform != "linux" or not shutil.which(compiler[0]):
        return []
    probe = [*compiler, "-shared", "-x", "c++", os.devnull, option, "-o", os.devnull]
    return [option] if subprocess.run(probe, capture_output=True).returncode == 0 else []


def architecture_flags() -> tuple[list[str], str]:
    """nvcc's options for the architectures asked for, and their names for build_info."""
    flags, names = [], []
    for entry in re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES):
        match = re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", entry)
        if not match:
            sys.exit(f"deepsim_ext: TORCH_CUDA_ARCH_LIST takes entries like 8.0 or 9.0a+PTX, got {entry!r}")
        if int(match[1]) < 8:
            sys.exit(f"deepsim_ext: the CUDA kernels need compute capability 8.0 or more, got {entry}")
        number = match[1] + match[2]
        targets = [f"sm_{number}"] if f"sm_{number}" not in names else []
        targets += [f"compute_{number}"] if match[3] else []
        for target in targets:
            flags.append(f"-gencode=arch=compute_{number},code={target}")
            names.append(target)
    return flags, " ".join(names)


class Build(BuildExtension):
    """Compiles csrc/cuda/*.cu with nvcc first: they see no torch header, which takes seconds and fits any."""

    def build_extensions(self) -> None:
        extension = self.extensions[0]
        if NVCC:
            # Before the runtime, which is an archive: only what is asked for by then is taken from it.
            extension.extra_objects[:0] = self.cuda_objects()
        extension.sources = self.sources_by_folder(extension.sources)
        super().build_extensions()

    def sources_by_folder(self, sources: list[str]) -> list[str]:
        """A file for each folder that includes all of it: torch's headers take longer than the rest.

        Not of simd/, where each file is compiled for processors of its own.
        """
        apart = [source for source in sources if Path(source).parent.name == "simd"]
        folders = {Path(source).parent for source in sources if source not in apart}
        joined = []
        for folder in sorted(folders):
            target = Path(self.build_temp, f"{'_'.join(folder.parts)}.cpp")
            text = "".join(f'#include "{Path(s).resolve()}"\n' for s in sources if Path(s).parent == folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_text() != text:  # written anew it would be compiled anew
                target.write_text(text)
            joined.append(str(target))
        return apart + joined

    def cuda_objects(self) -> list[str]:
        options = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        # Host code cannot see for which GPUs device code is compiled.
        macros = ["-DDEEPSIM_SM_90A"] if "sm_90a" in ARCHITECTURE_NAMES.split() else []
        sources = [__file__, *glob("csrc/cuda/*"), *glob("csrc/common/*")]
        newest = max(Path(source).stat().st_mtime for source in sources)
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        running, objects = [], []
        for source in sorted(glob("csrc/cuda/*.cu")):
            # Named after what they are for, so that another TORCH_CUDA_ARCH_LIST compiles anew.
            target = Path(self.build_temp, f"{Path(source).stem}.{ARCHITECTURE_NAMES.replace(' ', '.')}.o")
            objects.append(str(target))
            if target.exists() and target.stat().st_mtime > newest:
                continue
            command = [NVCC, *options, *ARCHITECTURE_FLAGS, *macros, "-c", source, "-o", str(target)]
            running.append(subprocess.Popen(command))
        if any([process.wait() for process in running]):
            sys.exit("deepsim_ext: nvcc failed; DEEPSIM_CUDA=0 builds without CUDA kernels")
        return objects


NVCC = find_nvcc()
ARCHITECTURE_FLAGS, ARCHITECTURE_NAMES = architecture_flags() if NVCC else ([], "")
if NVCC:
    print(f"deepsim_ext: building CUDA kernels for {ARCHITECTURE_NAMES} with {NVCC}", file=sys.stderr)

openmp = ["-fopenmp"] if sys.platform == "linux" else []
setup(
    ext_modules=[
        CppExtension(
            "deepsim_ext._C",
            sorted(s for s in glob("csrc/**/*.cpp", recursive=True) if NVCC or Path(s).parent.name != "cuda"),
            # Python's own flags ask for debug information. It takes half of the time to compile torch's
            # headers, and three quarters of the module.
            extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-Wno-psabi", *openmp],
            extra_link_args=openmp + shared_standard_library(),
            define_macros=[("DEEPSIM_CUDA_ARCHITECTURES", f'"{ARCHITECTURE_NAMES}"')],
            extra_objects=[cuda_runtime(NVCC)] if NVCC else [],
            libraries=["rt", "dl", "pthread"] if NVCC else [],
        )
    ],
    cmdclass={"build_ext": Build},
)
