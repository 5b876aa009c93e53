"""`python -m deepsim_ext stylize`, and the same as the function `stylize`: pictures in the style of others.

Needs the extra `deepsim-ext[stylize]`; its packages are imported only where pictures are read and written.
"""

from __future__ import annotations

from .command import PACKAGES, add_arguments, run
from .driver import Record, Transfer, stylize
from .options import Options

__all__ = ["PACKAGES", "Options", "Record", "Transfer", "add_arguments", "run", "stylize"]
