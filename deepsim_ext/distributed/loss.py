"""Batch losses over the batches of all ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .. import _checks, functional
from .._checks.texts import describe, error
from ..nn.embeddings import BatchLoss
from ..nn.memory import CrossBatchMemory
from ..results import ContrastiveResult, TripletLossResult
from . import _batch_all, _batch_hard, _contrastive, _semi_hard
from ._agree import group_of
from ._batches import Batches, exchange, is_differentiated
from ._gather import gathered_loss
from ._memory import add_memory_loss
from ._result import RankResult, WithGradient

MODES = ("auto", "ring", "gather")
# Up to so many rows in all they are gathered: to send blocks round and to ask for rows takes longer than to
# compute everything everywhere. Measured on two processes of one machine (cpu-distributed.md).
MOST_GATHERED_ROWS = 4096

# By the function that a loss is a module of.
_ring_losses: dict[Callable[..., Any], Callable[..., RankResult]] = {
    functional.batch_all_triplet_loss: _batch_all.ring_loss,
    functional.batch_contrastive_loss: _contrastive.ring_loss,
    functional.batch_hard_triplet_loss: _batch_hard.ring_loss,
    functional.batch_semi_hard_triplet_loss: _semi_hard.ring_loss,
}


class DistributedLoss(nn.Module):
    """A batch loss over the union of the batches of all ranks, as if one process had them in rank order.

    Every rank calls it with its own rows, of any number, also none; a label means the same on all ranks. What
    a mean is over, valid anchors or pairs, is counted over all ranks. The value is the same on every rank, to
    the bit.

    Gradients: DistributedDataParallel and fully_shard average the gradients of parameters over the ranks,
    while the loss is one, to which every rank adds its rows' part. So the gradient of the embeddings is
    returned times the number of ranks, and the average is the gradient of the loss as one process has it.
    Without such averaging, where gradients are added up, say `averaged_gradients=False`. Gradients flow to
    the rows of all ranks, those that others have chosen included. They are formed in `forward`: backward
    waits for nobody, and has no second derivative.

    Ways to get there, with the same numbers up to rounding, each bitwise repeatable for its number of ranks:

        ring    Blocks of rows go round the ranks, each two of which meet once, while tiles are worked on.
                What is chosen is then fetched row by row. Memory is O(n D), with at most two blocks of others
                in flight, and 8 bytes for each of all rows' labels; for losses of all positives, and other
                strategies than the hardest, also O(n K) for K rows of a label. Arithmetic is shared out
                evenly. Batch-hard chooses the same for any number of ranks: equal distances go to the lowest
                index in the union. On CUDA batch-hard's search of blocks and the distances of chosen pairs
                have kernels; all other steps are plain torch so far, and none has been run over several GPUs.
        gather  Every rank gets all rows and computes the whole. Memory is O(N D), arithmetic is that of one
                process, and there is one exchange only: for small batches, and for every device.

    A `CrossBatchMemory` of a batch loss becomes one that all ranks fill together: the union of the batches
    goes into it, every rank has the whole of it, and holds its own rows against it.

    Without an initialised process group, and in a group of one, it is `loss` itself.

    Args:
        loss: a batch loss of `deepsim_ext.nn`; any reduction but "none". Or a `CrossBatchMemory`, with the
            same contents on every rank.
        process_group: None for the default group.
        mode: "ring", "gather", or "auto" for one of them: the ring on the CPU from 4,097 rows in all.
        averaged_gradients: whether gradients are multiplied by the number of ranks, as above.

    Raises:
        TypeError, ValueError: at construction for an argument that is none of the above; in `forward`, on
            this rank for embeddings that are not [n, D] or labels that are not int64 [n], and on all ranks
            where D, dtypes, kinds of device, options or fill levels of the memory are not the same.
        RuntimeError: in `forward`, where another rank's arguments are wrong; names the rank.
    """

    def __init__(
        self,
        loss: BatchLoss | CrossBatchMemory,
        process_group: ProcessGroup | None = None,
        *,
        mode: str = "auto",
        averaged_gradients: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        expected = 'a batch loss of deepsim_ext.nn without reduction="none", or a CrossBatchMemory'
        if not isinstance(loss, BatchLoss | CrossBatchMemory):
            raise error(TypeError, name, "loss", expected, describe(loss))
        if isinstance(loss, BatchLoss) and loss.options["reduction"] == "none":
            raise error(ValueError, name, "loss", expected, repr(loss))
        _checks.choice(name, "mode", mode, MODES)
        _checks.flag(name, "averaged_gradients", averaged_gradients)
        group_of(name, process_group)
        self.loss, self.process_group = loss, process_group
        self.mode, self.averaged_gradients = mode, averaged_gradients

    @torch.compiler.disable
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor | TripletLossResult | ContrastiveResult:
        """embeddings [n, D] and labels int64 [n] of this rank; a scalar, or the loss with its statistics."""
        name = type(self).__name__
        group = group_of(name, self.process_group)
        if group is None:
            return self.loss(embeddings, labels)

        memory = self.loss if isinstance(self.loss, CrossBatchMemory) else None
        loss_of_batch = self.loss if memory is None else memory.loss

        def check() -> tuple[Tensor, Tensor]:
            if memory is not None:
                _checks.cross_batch_memory(name, embeddings, labels, memory.memory)
            distance = loss_of_batch.options["distance"]
            return _checks.batch_hard(name, embeddings, labels, None, None, distance=distance)[:2]

        options = type(loss_of_batch).__name__, loss_of_batch.options, self.mode, self.averaged_gradients
        if memory is not None:
            options += memory.extra_repr(), memory.get_extra_state(), memory.training
        x, batches = exchange(name, group, options, check)
        with torch.no_grad():
            of_batches = self._of_all(loss_of_batch, x, labels, batches)
            if memory is not None:
                of_batches = add_memory_loss(of_batches, memory, x, labels, batches)
        result, grad = of_batches
        loss = result.loss
        if is_differentiated(embeddings):
            scale = batches.world_size if self.averaged_gradients else 1
            loss = WithGradient.apply(embeddings, loss, scale * grad)
        return result._replace(loss=loss) if loss_of_batch.options["return_stats"] else loss

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}, averaged_gradients={self.averaged_gradients}"

    def _of_all(self, loss: BatchLoss, x: Tensor, labels: Tensor, batches: Batches) -> RankResult:
        if is_gathered(self.mode, x, batches):
            return gathered_loss(loss, x, batches, with_gradient=batches.with_gradient)
        options = {name: value for name, value in loss.options.items() if name != "return_stats"}
        ring_loss = _ring_losses[loss.function]
        return ring_loss(x, labels, batches, **options, with_gradient=batches.with_gradient)


def is_gathered(mode: str, x: Tensor, batches: Batches) -> bool:
    """Whether all rows go to every rank: CUDA has no kernels for most of what a ring needs."""
    few = batches.offsets[-1] <= MOST_GATHERED_ROWS
    return (few or x.device.type != "cpu") if mode == "auto" else mode == "gather"
