"""The package around the ops: import error, command line, build options, names, signatures, documentation."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepsim_ext
from deepsim_ext import functional, nn, reference

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )


def test_an_unbuilt_checkout_says_how_to_build_it(tmp_path):
    shutil.copytree(
        ROOT / "deepsim_ext", tmp_path / "deepsim_ext", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    # An editable install would lend its own compiled module to the copy.
    forget = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]"
    code = f"{forget}; import deepsim_ext"
    process = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert process.returncode == 1
    message = process.stderr[process.stderr.rindex("ImportError: ") :]
    assert "deepsim_ext._C could not be loaded" in message
    assert "    pip install --no-build-isolation -e .\n" in message
    assert f"found the package in {tmp_path / 'deepsim_ext'}." in message and "leave that folder" in message


def test_parts_that_take_time_are_imported_on_demand():
    code = """
import sys, deepsim_ext
for name in ("verification", "recognition", "evaluation", "distributed", "mapped", "compat", "stylize"):
    assert f"deepsim_ext.{name}" not in sys.modules, name
    assert getattr(deepsim_ext, name) is sys.modules[f"deepsim_ext.{name}"]
    assert name in dir(deepsim_ext)
deepsim_ext.nonsense
"""
    process = python("-c", code)
    assert process.stderr.splitlines()[-1] == (
        "AttributeError: module 'deepsim_ext' has no attribute 'nonsense'"
    )


def test_info_prints_what_a_bug_report_needs():
    process = python("-m", "deepsim_ext", "info")
    assert process.returncode == 0, process.stderr
    rows = dict(re.split(r":\s+", line, maxsplit=1) for line in process.stdout.splitlines())
    build = deepsim_ext.build_info()
    assert rows["deepsim_ext"] == deepsim_ext.__version__
    assert rows["torch"] == torch.__version__
    assert rows["built against torch"] == build["torch_version"]
    assert rows["compiler"] == build["compiler"]
    assert rows["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert rows["CPU kernels"].startswith(f"{build['cpu_capability']}, ")
    assert rows["CUDA kernels"] == (build["cuda_architectures"] or "not built")
    assert rows["CUDA in torch"].startswith(torch.version.cuda or "no, ")


@pytest.mark.parametrize("command", ["info", "demo"])
def test_kernels_that_this_processor_lacks_are_one_line(command, tmp_path):
    process = python(
        "-m", "deepsim_ext", command, PYTHONPATH=str(ROOT), DEEPSIM_CPU_CAPABILITY="foo", cwd=tmp_path
    )
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("deepsim_ext: DEEPSIM_CPU_CAPABILITY must be one of ")
    assert process.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_a_wrong_command_names_the_right_ones(arguments):
    process = python("-m", "deepsim_ext", *arguments)
    assert process.returncode == 2
    assert "info" in process.stderr
    assert "demo" in process.stderr


def test_the_package_is_built_against_the_torch_that_is_installed():
    assert deepsim_ext.build_info()["torch_version"] == torch.__version__.split("+")[0]


# ---- setup.py ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "status", "said"),
    [
        ("auto", 0, "deepsim_ext: building CPU kernels only: nvcc was not found (set CUDA_HOME or PATH)"),
        ("0", 0, "deepsim_ext: building CPU kernels only: DEEPSIM_CUDA=0"),
        ("1", 1, "deepsim_ext: DEEPSIM_CUDA=1, but nvcc was not found (set CUDA_HOME or PATH)"),
        ("yes", 1, "deepsim_ext: DEEPSIM_CUDA must be auto, 0 or 1, got 'yes'"),
        ("", 1, "deepsim_ext: DEEPSIM_CUDA must be auto, 0 or 1, got ''"),
    ],
)
def test_setup_without_nvcc(wish, status, said, tmp_path):
    # An empty folder for CUDA_HOME, because torch looks in default places if there is none.
    process = python("setup.py", "--version", PATH=str(tmp_path), CUDA_HOME=str(tmp_path), DEEPSIM_CUDA=wish)
    assert process.returncode == status, process.stderr
    assert said in process.stderr.splitlines()
    if status == 0:
        assert process.stdout.strip().splitlines()[-1] == deepsim_ext.__version__


@pytest.mark.parametrize(
    ("architectures", "status", "said"),
    [
        ("", 0, "building CUDA kernels for sm_80 sm_90a compute_80 with "),
        ("8.6;12.0+PTX", 0, "building CUDA kernels for sm_86 sm_120 compute_120 with "),
        ("Hopper", 1, "TORCH_CUDA_ARCH_LIST takes entries like 8.0 or 9.0a+PTX, got 'Hopper'"),
        ("7.5 8.0", 1, "the CUDA kernels need compute capability 8.0 or more, got 7.5"),
    ],
)
def test_setup_with_nvcc(architectures, status, said, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}' >&2\n")
    nvcc.chmod(0o755)
    environment = {"CUDA_HOME": str(tmp_path), "DEEPSIM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    process = python("setup.py", "--version", **environment)
    assert process.returncode == status, process.stderr
    assert f"deepsim_ext: {said}" in process.stderr


def test_cuda_kernels_are_registered_where_they_are_built():
    """With any torch, also one that knows no GPU."""
    built = bool(deepsim_ext.build_info()["cuda_architectures"])
    ops = (
        "batch_hard_mine",
        "batch_hard_extremes",
        "batch_hard_triplet_loss",
        "batch_hard_triplet_loss_backward",
    )
    ops = (
        *ops,
        "gram_matrix",
        "gram_matrix_backward",
        "style_loss",
        "triplet_margin_loss",
        "contrastive_loss",
    )
    for op in ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deepsim_ext::{op}", "CUDA") == built


# ---- names, signatures, documentation ----------------------------------------------------------------------

FUNCTIONS = sorted(functional.__all__)
MODULES = {
    "BatchAllTripletLoss": "batch_all_triplet_loss",
    "BatchContrastiveLoss": "batch_contrastive_loss",
    "BatchSemiHardTripletLoss": "batch_semi_hard_triplet_loss",
    "TripletMarginLoss": "triplet_margin_loss",
    "BatchHardTripletLoss": "batch_hard_triplet_loss",
    "ContentLoss": "content_loss",
    "ContrastiveLoss": "contrastive_loss",
    "GramMatrix": "gram_matrix",
    "StyleLoss": "style_loss",
    "TotalVariationLoss": "total_variation_loss",
}


HEADS = ["L2Normalize", "SiameseDistance", "SiameseHead"]


def test_functions_and_reference_agree_on_names():
    assert sorted(reference.__all__) == FUNCTIONS
    assert sorted(nn.__all__) == sorted([*MODULES, *HEADS, "CrossBatchMemory", "StyleTransferLoss"])


def test_everything_is_found_at_top_level():
    assert len(set(deepsim_ext.__all__)) == len(deepsim_ext.__all__)
    for name in deepsim_ext.__all__:
        assert hasattr(deepsim_ext, name)
    for name in FUNCTIONS:
        assert name in deepsim_ext.__all__
        assert getattr(deepsim_ext, name) is getattr(functional, name)
    namespace: dict = {}
    exec("from deepsim_ext import *", namespace)
    assert set(deepsim_ext.__all__) <= namespace.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_function_and_reference_have_one_signature(name):
    assert inspect.signature(getattr(functional, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize(("module", "function"), MODULES.items())
def test_modules_take_the_options_of_their_function(module, function):
    """Tensors positional in forward, options by keyword at construction, with the function's defaults.

    A mask is a tensor, by keyword in both.
    """
    parameters = inspect.signature(getattr(functional, function)).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "mask"}
    tensors = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD or p.name == "mask"]
    made = inspect.signature(getattr(nn, module)).parameters.values()
    assert {p.name: p.default for p in made} == options
    assert all(p.kind is p.KEYWORD_ONLY for p in made)
    assert list(inspect.signature(getattr(nn, module).forward).parameters)[1:] == tensors


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_documents_arguments_result_errors_and_source(name):
    function = getattr(functional, name)
    text = inspect.getdoc(function)
    for section in ("Args:", "Returns:", "Raises:", "Source: "):
        assert section in text, section
    described = text[text.index("Args:") : text.index("Returns:")]
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"\b{argument}\b", described), argument
    assert re.search(r"\[N\]|\[B, C, |\bshapes?\b", text), "no shapes"
    assert "float32" in text
    assert "TypeError" in text and "ValueError" in text
    assert inspect.getdoc(getattr(reference, name))


RESULTS = ["ContrastiveResult", "NearestNeighbors", "StyleTransferResult", "TripletLossResult"]


@pytest.mark.parametrize(
    "name",
    [
        *MODULES,
        *HEADS,
        *RESULTS,
        "CrossBatchMemory",
        "GramAccumulator",
        "StyleTransferLoss",
        "build_info",
        "cached_backward",
    ],
)
def test_every_other_public_name_has_a_docstring(name):
    assert inspect.getdoc(getattr(nn, name, None) or getattr(deepsim_ext, name))


# ---- what is in the repository -----------------------------------------------------------------------------


def test_the_code_in_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of it writes files
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    namespace: dict = {"__name__": "readme"}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, "README.md", "exec"), namespace)


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in names.split("\0") if name]


# Directories of somebody's machine; the package needs none of them.
PRIVATE_PATH = re.compile(r"(?<![\w.<}])/(?:home|Users|root|work|mnt|tmp|scratch)/[\w.]")


def test_no_file_names_a_private_path():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except (UnicodeDecodeError, FileNotFoundError):  # a picture; a file deleted but not yet committed
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in PRIVATE_PATH.finditer(text)]
    assert not found


def test_private_paths_are_seen():
    for directory in ("home", "work", "tmp"):
        assert PRIVATE_PATH.search(f"cd '/{directory}/someone'")
    for harmless in ("a/home/b", "https://example.org/home/x", "framework/", "benchmarks/results/"):
        assert not PRIVATE_PATH.search(harmless)
