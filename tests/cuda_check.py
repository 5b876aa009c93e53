"""What nvcc makes of the CUDA kernels: `make cuda-check`. Needs nvcc and nvdisasm, no GPU.

Compiles every csrc/cuda/*.cu for each architecture and prints a table of the kernels: registers, shared
memory, blocks that fit on a multiprocessor at once, tensor-core instructions. Fails on a warning, a spill,
local memory, a kernel that should use tensor cores and does not, a kernel of which fewer blocks fit than its
design counts on, and a kernel it has not heard of. The programs that gpu-check runs have to compile.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .gpu_check import CHECK_FLAGS, CHECKS

ROOT = Path(__file__).parents[1]

# Shared memory of a multiprocessor in bytes. Every block takes 1 KiB more than it asks for.
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}
# The most that one block may have on GPUs with compute capability 8.6 and 8.9.
MOST_SHARED_BYTES = 99 * 1024
REGISTERS, MOST_THREADS, SYSTEM_SHARED_BYTES = 65536, 2048, 1024

# The largest dynamic shared memory that a kernel is launched with, by its name in the source.
SHARED_SOURCE = """
#include "csrc/cuda/all_pairs.cu"
#include "csrc/cuda/batch_all.cu"
#include "csrc/cuda/batch_contrastive.cu"
#include "csrc/cuda/batch_hard.cu"
#include "csrc/cuda/batch_semi_hard.cu"
#include "csrc/cuda/given_rows.cu"
#include "csrc/cuda/gram.cu"
#include "csrc/cuda/mine_triplets.cu"
#include "csrc/cuda/nearest_neighbors.cu"
#include "csrc/cuda/pair_distances.cu"
using namespace deepsim::cuda;
int main() {
  std::printf("sort_runs_kernel %zu\\n", sizeof(RunShared<int64_t>));
  std::printf("merge_runs_kernel %zu\\n", sizeof(MergeShared));
  std::printf("centre_sums_kernel %zu\\n", kCentreThreads * sizeof(double));
  std::printf("centre_kernel %zu\\n", kSpreadPairs * sizeof(double));
  std::printf("mine_direct_kernel %zu\\n", sizeof(DirectShared<double>));
  std::printf("mine_mma_kernel %zu\\n", sizeof(MmaShared));
  std::printf("mine_wgmma_kernel %zu\\n", sizeof(WgmmaShared));
  std::printf("choose_again_kernel %zu\\n", sizeof(ChoosingShared));
  std::printf("finish_kernel %zu\\n", sizeof(LossShared));
  std::printf("gradient_kernel %zu\\n", sizeof(GradientShared));
  std::printf("pair_gradient_kernel %zu\\n", sizeof(GradientShared));
  std::printf("given_losses_kernel %zu\\n", sizeof(LossShared));
  std::printf("stripe_distances_kernel %zu\\n", sizeof(DirectElements<double>));
  std::printf("pair_products_kernel %zu\\n", sizeof(PairTileShared));
  std::printf("batch_all_rows_kernel %zu\\n", sizeof(BatchAllShared<double>));
  std::printf("contrastive_rows_kernel %zu\\n", sizeof(RowSumsShared));
  std::printf("semi_hard_rows_kernel %zu\\n", sizeof(SemiHardShared<double>));
  std::printf("mine_rows_kernel %zu\\n", sizeof(MiningShared<double>));
  std::printf("near_products_kernel %zu\\n", sizeof(ProductStage<PairProduct>[kPairStages]));
  std::printf("nearest_rows_kernel %zu\\n", sizeof(NearestShared<double>));
  std::printf("nearest_candidates_kernel %zu\\n", sizeof(NearestShared<float>));
  std::printf("finish_sums_kernel %zu\\n", sizeof(RowSumsShared));
  std::printf("pull_kernel %zu\\n", sizeof(PullShared));
  std::printf("pull_products_kernel %zu\\n", sizeof(ProductStage<PullProduct>[kPullStages]));
  std::printf("strength_sums_kernel %zu\\n", kBlockThreads * sizeof(float));
  using Tile = TensorProduct<Half, kGramTile, 1, false>;
  using GradientTile = TensorProduct<Half, kGradientPositions, 2, false>;
  std::printf("gram_tiles_kernel %zu\\n", sizeof(TilesShared<Tile>));
  std::printf("gram_gradient_kernel %zu\\n", sizeof(GradientTileShared<GradientTile>));
  std::printf("symmetrise_kernel %zu\\n", sizeof(uint32_t));
  std::printf("gram_reduce_kernel %zu\\n", sizeof(ReduceShared));
}
"""


@dataclass(frozen=True)
class Expectation:
    """What a kernel must show."""

    threads: int = 256  # of a block, but 128 of a plain product
    tensor_cores: bool = False
    least_blocks: int = 1
    least_blocks_deep: int = 1  # of the version for deep rows, where there is one
    architectures: tuple[str, ...] = tuple(SHARED_BYTES)  # in others the kernel is empty


EXPECTATIONS = {
    "norms_kernel": Expectation(),
    "sort_runs_kernel": Expectation(threads=128),
    "merge_runs_kernel": Expectation(),
    "centre_sums_kernel": Expectation(),
    "centre_kernel": Expectation(),
    "pack_kernel": Expectation(),
    "mine_direct_kernel": Expectation(least_blocks=2),
    # Deep rows have a second set of sums instead of a second block.
    "mine_mma_kernel": Expectation(tensor_cores=True, least_blocks=2, least_blocks_deep=1),
    "mine_wgmma_kernel": Expectation(
        tensor_cores=True, least_blocks=2, least_blocks_deep=1, architectures=("sm_90a",)
    ),
    "choose_again_kernel": Expectation(least_blocks=2),
    "finish_kernel": Expectation(least_blocks=2),
    "extremes_kernel": Expectation(least_blocks=2),
    "lay_choices_kernel": Expectation(),
    "prepare_kernel": Expectation(),
    "gradient_kernel": Expectation(least_blocks=2),
    "pair_distances_kernel": Expectation(least_blocks=3),
    "pair_gradient_kernel": Expectation(least_blocks=2),
    "given_losses_kernel": Expectation(least_blocks=3),
    "given_gradient_kernel": Expectation(least_blocks=3),
    "stripe_distances_kernel": Expectation(least_blocks=2),
    "centre_rows_kernel": Expectation(),
    "pair_products_kernel": Expectation(tensor_cores=True, least_blocks=2),
    "batch_all_rows_kernel": Expectation(least_blocks=2),
    "contrastive_rows_kernel": Expectation(least_blocks=2),
    "semi_hard_rows_kernel": Expectation(least_blocks=2),
    "mine_rows_kernel": Expectation(least_blocks=2),
    "near_products_kernel": Expectation(tensor_cores=True, least_blocks=2),
    "nearest_rows_kernel": Expectation(least_blocks=2),
    "nearest_candidates_kernel": Expectation(least_blocks=2),
    "nobody_near_kernel": Expectation(),
    "finish_sums_kernel": Expectation(),
    "pull_kernel": Expectation(),
    "pull_products_kernel": Expectation(tensor_cores=True, least_blocks=2),
    "strength_sums_kernel": Expectation(),
    "pull_singles_kernel": Expectation(),
    "add_splits_kernel": Expectation(),
    "finish_gradient_kernel": Expectation(),
    "gram_tiles_kernel": Expectation(threads=128, tensor_cores=True, least_blocks=2),
    "gram_reduce_kernel": Expectation(),
    "symmetrise_kernel": Expectation(threads=128),
    "gram_gradient_kernel": Expectation(tensor_cores=True, least_blocks=2),
}


@dataclass
class Kernel:
    """One compiled kernel."""

    architecture: str
    symbol: str  # mangled
    registers: int
    stack: int  # bytes
    spills: int  # bytes
    tensor: int = 0  # instructions
    local: int = 0  # instructions

    @property
    def name(self) -> str:
        return re.search(r"\d([a-z][a-z_]*_kernel)", self.symbol)[1]

    @property
    def plain(self) -> bool:
        """Whether this is the float64 version, which has no use for tensor cores."""
        return "PlainProduct" in self.symbol

    @property
    def deep(self) -> bool:
        """Whether this is the version for rows of many columns."""
        return "INS0_5SplitELb1E" in self.symbol


def run(*command: str | Path) -> str:
    """What a command prints; ends the check if it fails."""
    process = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)
    if process.returncode != 0:
        sys.exit(f"cuda-check: {command[0]} failed:\n{process.stdout}{process.stderr}")
    return process.stdout + process.stderr


def find(tool: str) -> str:
    """A tool on the path, or among Python's packages as NVIDIA's wheels bring it."""
    packages = Path(sysconfig.get_paths()["purelib"], "nvidia")
    for candidate in [shutil.which(tool), *packages.glob(f"*/bin/{tool}"), *packages.glob(f"*/*/bin/{tool}")]:
        if candidate:
            return str(candidate)
    sys.exit(f"cuda-check: {tool} was not found (nvdisasm comes with pip install nvidia-cuda-nvdisasm)")


def kernels_of(log: str, architecture: str) -> Iterator[Kernel]:
    """The kernels in ptxas's report."""
    pattern = (
        r"Compiling entry function '(\w+)' for '\w+'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for match in re.finditer(pattern, log, re.DOTALL):
        stack, stores, loads, registers = (int(n) for n in match.groups()[1:])
        yield Kernel(architecture, match[1], registers, stack, stores + loads)


def compile_for(source: Path, architecture: str, folder: Path) -> list[Kernel]:
    """Compiles one file for one architecture, and counts instructions in what came out."""
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    options = ["-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Werror=all-warnings"]
    log = run(find("nvcc"), *options, "-Xptxas=-v,-warn-spills,-warn-lmem-usage", source, "-o", cubin)
    if "Potential Performance Loss" in log:  # wgmma one at a time: neither a warning nor an error to ptxas
        sys.exit(f"cuda-check: {source.name} for {architecture}:\n{log}")
    kernels = list(kernels_of(log, architecture))
    sections = re.split(r"^\s*\.section\s+\.text\.(\w+)", run(find("nvdisasm"), cubin), flags=re.MULTILINE)
    code = dict(zip(sections[1::2], sections[2::2], strict=True))
    for kernel in kernels:
        kernel.tensor = len(re.findall(r"\b(?:HMMA|HGMMA)\b", code[kernel.symbol]))
        kernel.local = len(re.findall(r"\b(?:STL|LDL)\b", code[kernel.symbol]))
    return kernels


def compile_program(source: Path, folder: Path, *options: str) -> None:
    """Compiles a program that gpu-check builds first, for Hopper."""
    options = (*CHECK_FLAGS, "-DDEEPSIM_SM_90A", *options, "-c")
    run(find("nvcc"), *options, source, "-o", folder / f"{source.stem}.o")


def shared_bytes(folder: Path) -> dict[str, int]:
    """Dynamic shared memory by kernel, from the structs themselves."""
    source, program = folder / "shared.cpp", folder / "shared"
    source.write_text(SHARED_SOURCE)
    run(
        "g++",
        "-std=c++17",
        f"-I{ROOT}",
        f"-I{ROOT / 'tests' / 'emulator'}",
        "-Wno-psabi",
        source,
        "-o",
        program,
    )
    return {name: int(size) for name, size in (line.split() for line in run(program).splitlines())}


def blocks_per_multiprocessor(kernel: Kernel, shared: int) -> int:
    """How many blocks run at once, by registers (given out in eights), shared memory and threads."""
    threads = 128 if kernel.plain else EXPECTATIONS.get(kernel.name, Expectation()).threads
    by_registers = REGISTERS // (threads * -(-kernel.registers // 8) * 8)
    by_shared = SHARED_BYTES[kernel.architecture] // (shared + SYSTEM_SHARED_BYTES)
    return min(by_registers, by_shared, MOST_THREADS // threads)


def complaints(kernel: Kernel, shared: int, blocks: int) -> Iterator[str]:
    """What is wrong with a kernel."""
    expected = EXPECTATIONS.get(kernel.name)
    if expected is None:
        yield "not listed in EXPECTATIONS"
        return
    if kernel.spills or kernel.stack or kernel.local:
        yield f"{kernel.spills} bytes spilled, {kernel.stack} bytes of stack, {kernel.local} local accesses"
    if kernel.architecture not in expected.architectures:
        return
    if expected.tensor_cores and not kernel.plain and not kernel.tensor:
        yield "no tensor-core instruction"
    if shared > MOST_SHARED_BYTES and kernel.architecture != "sm_90a":
        yield f"{shared} bytes of shared memory, more than the {MOST_SHARED_BYTES} of smaller GPUs"
    least = expected.least_blocks_deep if kernel.deep else expected.least_blocks
    if blocks < least:
        yield f"{blocks} blocks fit on a multiprocessor, fewer than {least}"


def main() -> int:
    """Prints the table and what is wrong."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor() as pool:
        folder = Path(temporary)
        jobs = [(source, architecture) for source in sources for architecture in SHARED_BYTES]
        # Kernels of csrc are compiled in full by the jobs: in programs with hardly any other, PTX will do.
        programs = {f"check_{check}.cpp": ("-arch=compute_90a", "-Xcicc", "-O0") for check in CHECKS}
        programs["check_wrappers.cpp"] = ("-arch=sm_90a",)
        compiled = pool.map(
            lambda name: compile_program(ROOT / "tests" / "emulator" / name, folder, *programs[name]),
            programs,
        )
        found = [k for kernels in pool.map(lambda job: compile_for(*job, folder), jobs) for k in kernels]
        list(compiled)  # an end of the check if one failed
        shared = shared_bytes(folder)
    names = run("c++filt", *(k.symbol for k in found)).splitlines()
    wrong = []
    print(f"{'':<8}{'registers':>10}{'shared':>9}{'blocks':>8}{'tensor':>8}  kernel")
    for kernel, name in sorted(
        zip(found, names, strict=True), key=lambda pair: (pair[1], pair[0].architecture)
    ):
        name = name.replace("(anonymous namespace)::", "")
        name = re.sub(r"^void |deepsim::cuda::|\(.*\)$", "", name)
        size = shared.get(kernel.name, 0)
        blocks = blocks_per_multiprocessor(kernel, size)
        print(f"{kernel.architecture:<8}{kernel.registers:>10}{size:>9}{blocks:>8}{kernel.tensor:>8}  {name}")
        wrong += [f"{kernel.architecture} {name}: {c}" for c in complaints(kernel, size, blocks)]
    missing = EXPECTATIONS.keys() - {k.name for k in found}
    wrong += [f"{name} is listed in EXPECTATIONS and was not compiled" for name in sorted(missing)]
    print(
        f"cuda-check: {len(found)} kernels, "
        + (f"{len(wrong)} complaints" if wrong else "nothing to complain of")
    )
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
