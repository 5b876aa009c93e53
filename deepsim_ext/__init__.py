"""Deep similarity, fast: metric-learning and style-transfer losses as fused kernels for PyTorch."""

from __future__ import annotations

import torch  # noqa: F401  (loads the libraries that the compiled module is linked against)

try:
    from ._C import build_info
except ImportError as error:
    raise ImportError(
        "deepsim_ext: the compiled module deepsim_ext._C could not be loaded"
        f" ({error}). In a source checkout, build it with\n"
        "    pip install --no-build-isolation -e .\n"
        "and build it again after changing the torch version."
    ) from error

from . import functional, nn, reference
from .functional import *  # noqa: F403
from .grad_cache import cached_backward
from .gram_accumulator import GramAccumulator
from .presets import StylePreset, style_preset
from .results import ContrastiveResult, NearestNeighbors, StyleTransferResult, TripletLossResult

__version__ = "0.1.0"

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
