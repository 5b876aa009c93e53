"""One seed for every test: the same examples in every run, whatever the machine; `--seed` draws others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

from . import on_cuda
from .emulator import build

settings.register_profile(
    "deepsim_ext",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("deepsim_ext")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of each test's random numbers")
    emulated = "run the CUDA kernels, on CPU tensors by the emulator (tests/emulator)"
    parser.addoption("--emulated", action="store_true", help=emulated)
    on_cuda = "run the CUDA kernels on the GPU: CPU tensors go there and back for every op"
    parser.addoption("--on-cuda", action="store_true", help=on_cuda)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--emulated"):
        build.load()
    if config.getoption("--on-cuda"):
        on_cuda.redirect()


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(request.config.getoption("--seed"))
