"""Recognition, 1:N: a gallery of identities, its files, its commands, and the metrics of identification.

Saved galleries and search by faiss need the extra `deepsim-ext[gallery]`, imported only where used.
"""

from __future__ import annotations

from .command import add_enroll_arguments, add_identify_arguments, run_enroll, run_identify
from .gallery import Gallery, Identification, Verification
from .metrics import OpenSetRates, cmc, tpir_at_fpir

__all__ = [
    "Gallery",
    "Identification",
    "OpenSetRates",
    "Verification",
    "add_enroll_arguments",
    "add_identify_arguments",
    "cmc",
    "run_enroll",
    "run_identify",
    "tpir_at_fpir",
]
