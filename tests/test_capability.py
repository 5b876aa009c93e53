"""The CPU kernels of every instruction set that this machine has; none leaks into what always runs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepsim_ext
from deepsim_ext import (
    batch_hard_mine,
    batch_hard_triplet_loss,
    functional,
    gram_matrix,
    nearest_neighbors,
    reference,
    style_loss,
)

from .samples import DISTANCES, DTYPES, balanced_labels, batch_hard_samples, style_samples

ROOT = Path(__file__).resolve().parent.parent
NEEDS = {
    "portable": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"},
}


def machine_has() -> list[str]:
    """Worst first, by what the operating system says."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ["portable"]
    flags = (
        set(re.search(r"^flags\s*:(.*)$", text, re.M)[1].split()) if platform.machine() == "x86_64" else set()
    )
    return [name for name, needed in NEEDS.items() if needed <= flags]


def with_capability(name: str, command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"DEEPSIM_CPU_CAPABILITY": name}
    return subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def check_everything(capability: str) -> None:
    """Values, selections and gradients of all ops and dtypes against the reference, in this process."""
    assert deepsim_ext.build_info()["cpu_capability"] == capability
    for dtype in DTYPES:
        wide = dtype is torch.float64
        for i, sample in enumerate(batch_hard_samples(dtype)):
            options = {"distance": DISTANCES[i % 3], "margin": 1.1, "soft": i % 2 == 1, "reduction": "none"}
            for a, b in zip(
                batch_hard_mine(*sample.tensors, distance=options["distance"]),
                reference.batch_hard_mine(*sample.tensors, distance=options["distance"]),
                strict=True,
            ):
                assert torch.equal(a, b), (sample.name, options)
            compare(
                batch_hard_triplet_loss,
                reference.batch_hard_triplet_loss,
                sample.tensors,
                options,
                1e-12 if wide else 2e-6,
            )
        for i, sample in enumerate(
            s for s in style_samples(dtype) if not s.name.endswith(("-shared", "-one"))
        ):
            options = {"normalize": ("hw", "chw")[i % 2]}
            compare(gram_matrix, reference.gram_matrix, sample.tensors[:1], options, 1e-12 if wide else 2e-6)
            compare(style_loss, reference.style_loss, sample.tensors, options, 1e-12 if wide else 1e-5)
    for dtype in (torch.float32, torch.float64):
        check_all_pairs(dtype)
    # Several blocks of squares, on as many threads as there are.
    g = torch.Generator().manual_seed(7)
    x, labels = torch.randn(1500, 24, generator=g), balanced_labels(1500, 6, g)
    for a, b in zip(batch_hard_mine(x, labels), reference.batch_hard_mine(x, labels), strict=True):
        assert torch.equal(a, b)


def check_all_pairs(dtype: torch.dtype) -> None:
    """In float32 the choices of the semi-hard losses may differ where rounding decides: they are left out."""
    wide = dtype is torch.float64
    samples = [s for s in batch_hard_samples(dtype) if len(s.tensors[0]) <= 200 and s.name != "one_column"]
    for i, sample in enumerate(samples):
        for name, options in (
            ("batch_all_triplet_loss", {"margin": 0.5, "reduction": "mean"}),
            ("batch_contrastive_loss", {"neg_margin": 3.0, "squared": True, "reduction": "mean"}),
            *([("batch_semi_hard_triplet_loss", {"margin": 0.5})] if wide else []),
            *([("batch_semi_hard_triplet_loss", {"margin": 0.5, "definition": "pml"})] if wide else []),
        ):
            options = options | {"distance": DISTANCES[i % 3]}
            functions = getattr(functional, name), getattr(reference, name)
            compare(*functions, sample.tensors, options, 1e-10 if wide else 3e-5)
        for strategies in (("easy", "easy"), ("easy", "hard"), ("hard", "semihard"), ("semihard", "easy")):
            options = dict(zip(("positive", "negative"), strategies, strict=True))
            mined = (f(*sample.tensors, **options) for f in (batch_hard_mine, reference.batch_hard_mine))
            assert all(torch.equal(a, b) for a, b in zip(*mined, strict=True)), (sample.name, options)
        queries, _, gallery, _ = sample.tensors
        if len(queries if gallery is None else gallery) > 5:
            got, expected = (f(queries, gallery, 5) for f in (nearest_neighbors, reference.nearest_neighbors))
            torch.testing.assert_close(got.distances, expected.distances)


def compare(ours, theirs, tensors, options, rtol) -> None:
    """Result and gradients, in the norm; those of 16-bit inputs are rounded to them."""
    leaves = [
        t if t is None or not t.is_floating_point() else t.detach().clone().requires_grad_() for t in tensors
    ]
    exact = [
        t if t is None or not t.is_floating_point() else t.detach().double().clone().requires_grad_()
        for t in tensors
    ]
    got, expected = ours(*leaves, **options), theirs(*exact, **options)
    weights = torch.arange(1.0, got.numel() + 1, dtype=torch.float64).reshape(got.shape)
    inputs, exact_inputs = ([t for t in ts if t is not None and t.requires_grad] for ts in (leaves, exact))
    grads = torch.autograd.grad(expected, exact_inputs, weights)
    # A power of two, as a gradient scaler has: 16-bit gradients stay normal numbers.
    largest = max((g.abs().max() for g in grads if g.numel()), default=torch.zeros(()))
    scale = torch.exp2(largest.log2().round().neg()) if largest else 1.0
    got_grads = torch.autograd.grad(got, inputs, (weights * scale).to(got.dtype))
    for a, b in ((got, expected), *((a, b * scale) for a, b in zip(got_grads, grads, strict=True))):
        assert (a.double() - b).norm() <= (5e-3 if a.dtype.itemsize == 2 else rtol) * b.norm() + 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_every_capability_computes_the_reference(name):
    """The selection is the reference's with each, so it is the same with all."""
    if name not in machine_has():
        pytest.skip(f"this processor has no {name}")
    process = with_capability(
        name, f"from tests.test_capability import check_everything; check_everything({name!r})"
    )
    assert process.returncode == 0, process.stderr


def test_the_best_capability_is_the_default():
    process = with_capability("", "import deepsim_ext; print(deepsim_ext.build_info()['cpu_capability'])")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == machine_has()[-1]


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx512,avx2"])
def test_an_unknown_capability_is_an_error_that_names_the_choices(name):
    process = with_capability(name, "import torch, deepsim_ext; deepsim_ext.gram_matrix(torch.ones(1, 2, 3))")
    assert process.returncode == 1
    best_first = ", ".join(reversed(machine_has()))
    expected = f"ValueError: DEEPSIM_CPU_CAPABILITY must be one of {best_first} on this processor, got {name}"
    assert expected in process.stderr


# ---- instructions ------------------------------------------------------------------------------------------


def functions_with_avx(disassembly: str) -> dict[str, str]:
    """Function -> its first AVX instruction, from `objdump -d -C`. Only AVX mnemonics begin with v."""
    found, function = {}, ""
    for line in disassembly.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = header[1]
        elif re.search(r"\t(\{\w+\} )?v[a-z0-9]+ .*%([xyz]mm|k)\d", line) or re.search(r"%[yz]mm\d", line):
            found.setdefault(function, line.strip())
    return found


def leaks(disassembly: str) -> dict[str, str]:
    """What would stop an older processor: AVX outside the namespaces that are chosen at run time."""
    allowed = re.compile(r"\bdeepsim::cpu::avx(2|512)::")
    return {f: line for f, line in functions_with_avx(disassembly).items() if not allowed.search(f)}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_no_wide_instruction_outside_the_chosen_kernels():
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", deepsim_ext._C.__file__]
    disassembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    everywhere = functions_with_avx(disassembly)
    assert any("deepsim::cpu::avx2::" in f and "%ymm" in line for f, line in everywhere.items())
    assert any("deepsim::cpu::avx512::" in f for f in everywhere)
    assert leaks(disassembly) == {}


@pytest.mark.parametrize(
    "line",
    [
        "    1000:\tvmovups %zmm0,(%rdi)",
        "    1000:\tvaddsd %xmm1,%xmm0,%xmm0",
        "    1000:\tvcmpleps (%rax),%zmm3,%k1",
        "    1000:\t{evex} vmovaps %ymm1,%ymm2",
    ],
)
def test_leaks_are_seen(line):
    assert leaks(f"0000 <std::vector<float>::resize()>:\n{line}\n") == {
        "std::vector<float>::resize()": line.strip()
    }
    assert leaks(f"0000 <void deepsim::cpu::avx512::mine<float>(int)>:\n{line}\n") == {}
    assert leaks("0000 <std::sort()>:\n    1000:\tmovups %xmm0,(%rdi)\n    1004:\tverr   %ax\n") == {}
