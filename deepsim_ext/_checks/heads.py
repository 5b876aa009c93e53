"""The heads of Siamese networks: what comes after the embeddings."""

from __future__ import annotations

from torch import Tensor

from .options import choice, positive_integer
from .tensors import check_embeddings, check_same_shape, compute_dtype, match_dtypes
from .texts import describe, error

HEAD_MODES = ("abs", "chi2")


def head_options(function: str, *, embedding_size: int, mode: str) -> int:
    """The options of SiameseHead; returns the size as an int."""
    choice(function, "mode", mode, HEAD_MODES)
    return positive_integer(function, "embedding_size", embedding_size)


def embedding_pairs(
    function: str, x1: Tensor, x2: Tensor, embedding_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings of both sides, in the dtype of the arithmetic."""
    check_embeddings(function, "x1", x1, "[N, D]")
    check_embeddings(function, "x2", x2, "[N, D]")
    check_same_shape(function, "x2", x2, "x1", x1)
    if embedding_size is not None and x1.shape[1] != embedding_size:
        expected = f"of shape [N, D]=[N, {embedding_size}]"
        raise error(ValueError, function, "x1", expected, describe(x1))
    x1, x2 = match_dtypes(function, "x1", x1, "x2", x2, (x1.dtype,))
    dtype = compute_dtype(x1)
    return x1.to(dtype), x2.to(dtype)
