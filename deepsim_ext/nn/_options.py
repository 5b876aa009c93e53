"""What the modules of single functions share."""

from __future__ import annotations

from torch import nn


class Options(nn.Module):
    """A module without parameters that holds the keyword options of one function."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
