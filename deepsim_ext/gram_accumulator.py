"""The Gram matrix of features that come in chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._checks.texts import describe, error
from .gram import gram_matrix


class GramAccumulator:
    """The Gram matrix of a layer that is given in spatial chunks, as of the tiles of a picture.

        accumulator = GramAccumulator()
        for chunk in chunks:
            accumulator.update(chunk)
        gram = accumulator.result()  # gram_matrix of all chunks side by side, to rounding

    Gradients go through `result` to every chunk that requires grad, whose graphs then all stay in memory. A
    picture too large for that takes two passes. The gradient by the Gram matrix, which the first pass ends
    with, is all that the second one needs to know of the other tiles:

        with torch.no_grad():
            for tile in tiles:
                accumulator.update(network(tile))
        gram = accumulator.result().requires_grad_()
        torch.nn.functional.mse_loss(gram, target).backward()  # or any loss of Gram matrices
        for tile in tiles:  # which require grad
            chunk = network(tile)
            chunk.backward(accumulator.gradient(chunk, gram.grad))

    The tiles' gradients are then those of the loss of the whole picture, exact to rounding. (What the network
    makes of a tile's border is the tile's own: where that matters, let tiles overlap by the network's
    receptive field and hand over their inner parts.) With several layers, an accumulator for each, hand their
    chunks and gradients to `torch.autograd.backward` together.

    Args:
        normalize: as in `gram_matrix`, with the number of positions of all chunks for N.

    Raises:
        TypeError, ValueError: at construction for an unknown `normalize`; in `update` and `gradient` for
            chunks that are not features of one B, C, dtype of arithmetic and device; in `result` and
            `gradient` without any chunk.
    """

    def __init__(self, *, normalize: str | float = "chw") -> None:
        _checks.gram_normalization(type(self).__name__, normalize)
        self.normalize = normalize
        self.positions = 0  # N so far
        self._sum: Tensor | None = None  # [B, C, C]: F F^T so far

    def update(self, chunk: Tensor) -> None:
        """Adds a chunk: [B, C, *spatial], of any spatial size and number of spatial dimensions."""
        self._check("update", chunk)
        part = gram_matrix(chunk, normalize="none")
        self._sum = part if self._sum is None else self._sum + part
        self.positions += chunk.shape[2:].numel()

    def result(self) -> Tensor:
        """[B, C, C] in float32, or float64 for float64 chunks."""
        if self._sum is None:
            raise error(ValueError, f"{type(self).__name__}.result", "the chunks", "at least one", "none")
        return self._sum / self._divisor()

    def gradient(self, chunk: Tensor, grad_gram: Tensor) -> Tensor:
        """The gradient of a loss by one chunk, from that by the Gram matrix.

        Args:
            chunk: one of those that made the Gram matrix, computed again.
            grad_gram: [B, C, C], gradient of the loss by `result()`, as it stands after all updates.

        Returns:
            Of the shape and dtype of `chunk`, rounded once; it carries no gradient itself.
        """
        function = f"{type(self).__name__}.gradient"
        self._check("gradient", chunk)
        if self._sum is None:
            raise error(ValueError, function, "the chunks", "at least one", "none")
        if not isinstance(grad_gram, Tensor) or grad_gram.shape != self._sum.shape:
            kind = ValueError if isinstance(grad_gram, Tensor) else TypeError
            expected = f"of the shape of the Gram matrix {list(self._sum.shape)}"
            raise error(kind, function, "grad_gram", expected, describe(grad_gram))
        with torch.no_grad():
            flat = torch.ops.deepsim_ext.gram_matrix_backward(
                grad_gram.to(self._sum), chunk.flatten(start_dim=2), "none", float(self._divisor())
            )
        return flat.reshape(chunk.shape)

    def _divisor(self) -> float:
        b, c = self._sum.shape[:2]
        n = self.positions
        divisors = {"none": 1, "hw": n, "chw": c * n, "bchw": b * c * n}
        return divisors[self.normalize] if isinstance(self.normalize, str) else self.normalize

    def _check(self, method: str, chunk: Tensor) -> None:
        function = f"{type(self).__name__}.{method}"
        _checks.check_features(function, "chunk", chunk)
        if self._sum is None:
            return
        b, c = self._sum.shape[:2]
        same_dtype = _checks.compute_dtype(chunk) == self._sum.dtype
        if chunk.shape[:2] != (b, c) or not same_dtype or chunk.device != self._sum.device:
            dtype = str(self._sum.dtype).removeprefix("torch.")
            expected = f"of B={b}, C={c} on {self._sum.device}, computed in {dtype}, as those before"
            kind = ValueError if same_dtype else TypeError
            raise error(kind, function, "chunk", expected, f"{describe(chunk)} on {chunk.device}")
