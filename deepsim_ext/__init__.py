"""Deep similarity, fast: metric-learning and style-transfer losses as fused kernels for PyTorch."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (loads the libraries that the compiled module is linked against)

try:
    from ._C import build_info
except ImportError as error:
    raise ImportError(
        f"deepsim_ext: the compiled module deepsim_ext._C could not be loaded ({error}).\n"
        f"Python found the package in {Path(__file__).parent}. If that is a source checkout, build it with\n"
        "    pip install --no-build-isolation -e .\n"
        "or, if you have installed the package without -e, leave that folder: it hides the installed one.\n"
        "Build again after changing the torch version."
    ) from error

from . import functional, nn, reference
from .functional import *  # noqa: F403
from .grad_cache import cached_backward
from .gram_accumulator import GramAccumulator
from .presets import StylePreset, style_preset
from .results import ContrastiveResult, NearestNeighbors, StyleTransferResult, TripletLossResult

__version__ = "0.1.0"

# Imported when they are asked for: they take time, or packages that the losses do without.
_ON_DEMAND = ("compat", "distributed", "evaluation", "mapped", "recognition", "stylize", "verification")

__all__ = [
    "ContrastiveResult",
    "GramAccumulator",
    "NearestNeighbors",
    "StylePreset",
    "StyleTransferResult",
    "TripletLossResult",
    "__version__",
    "build_info",
    "cached_backward",
    "functional",
    "nn",
    "reference",
    "style_preset",
    *functional.__all__,
]


def __getattr__(name: str) -> ModuleType:
    if name in _ON_DEMAND:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})
