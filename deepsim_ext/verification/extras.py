"""Packages of the extra `eval`, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

# import name -> name on PyPI; scipy comes with scikit-learn
PACKAGES = {"matplotlib": "matplotlib", "scipy": "scikit-learn", "sklearn": "scikit-learn"}


def required(function: str, module: str) -> ModuleType:
    """The module; if its package is missing, an ImportError that says how to get it."""
    package = module.split(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        name = PACKAGES[package]
        message = f'{function}: {name} is not installed; pip install "deepsim-ext[eval]"'
        raise ImportError(message) from None
