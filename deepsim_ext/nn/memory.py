"""Losses against what earlier batches left behind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _checks
from .._checks.texts import describe, error
from .embeddings import BatchLoss


class CrossBatchMemory(nn.Module):
    """A loss of the batch plus its loss against a queue of the latest rows of earlier batches.

    `loss(embeddings, labels) + weight * loss(embeddings, labels, memory, memory_labels)`; with an empty
    memory the first term alone. Then the batch, detached, takes the place of the oldest rows; of a batch of
    more than `memory_size` rows the last ones stay. Source: Wang, Zhang, Huang, Scott, "Cross-Batch Memory
    for Embedding Learning" (2020), where the batch is put into the queue first; here it comes after, so that
    no anchor meets itself.

    In eval mode the loss is the same and the memory stays as it is. A NaN or inf that was put there makes
    losses NaN until it is overwritten, or until `reset()`.

    `deepsim_ext.distributed.DistributedLoss` of it is a memory that all ranks share.

    Memory and fill level are in the state_dict: after a restart training continues in the same bits. The
    memory has the dtype and device that `.to()` gives it, at first float32 on the CPU; narrower embeddings,
    as under autocast, meet it in their own dtype. Position and fill level are Python numbers: no call waits
    for the device, but torch.compile would make a graph for every position, and a CUDA graph replay one.

    Args:
        loss: a batch loss of this module that returns a scalar: no "none" reduction, no statistics.
        embedding_size: D.
        memory_size: rows of the memory.
        weight: finite, >= 0; factor of the second term.

    Raises:
        TypeError, ValueError: at construction for an argument that is none of the above; in `forward`, which
            then leaves the memory as it was, for embeddings that are not [N, D] on the device of the memory
            or of a wider dtype, and for labels that are not int64 [N].
    """

    memory: Tensor  # [memory_size, D]
    memory_labels: Tensor  # int64 [memory_size]

    def __init__(
        self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, weight: float = 1.0
    ) -> None:
        super().__init__()
        name = type(self).__name__
        expected = 'a batch loss of deepsim_ext.nn without return_stats and reduction="none"'
        if not isinstance(loss, BatchLoss):
            raise error(TypeError, name, "loss", expected, describe(loss))
        if loss.options["return_stats"] or loss.options["reduction"] == "none":
            raise error(ValueError, name, "loss", expected, repr(loss))
        self.embedding_size, self.memory_size, self.weight = _checks.cross_batch_memory_options(
            name, embedding_size=embedding_size, memory_size=memory_size, weight=weight
        )
        self.loss = loss
        self.register_buffer("memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("memory_labels", torch.zeros(self.memory_size, dtype=torch.int64))
        self._enqueued = 0  # rows since the last reset: the next one goes to this modulo memory_size

    @property
    def filled(self) -> int:
        """Rows in the memory."""
        return min(self._enqueued, self.memory_size)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings [N, D], labels int64 [N]; a scalar, float32 or, for float64 embeddings, float64."""
        _checks.cross_batch_memory(type(self).__name__, embeddings, labels, self.memory)
        loss = self.loss(embeddings, labels)
        if self.filled:
            loss = loss + self.weight * self.loss(embeddings, labels, *self._rows(embeddings.dtype))
        if self.training:
            self._enqueue(embeddings.detach(), labels)
        return loss

    def reset(self) -> None:
        """Empties the memory."""
        self.memory.zero_()
        self.memory_labels.zero_()
        self._enqueued = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"enqueued": self._enqueued}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._enqueued = state["enqueued"]

    def extra_repr(self) -> str:
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size}, weight={self.weight!r}"

    def _rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copies of the rows [filled, D] and their labels: a later call overwrites them, perhaps before the
        backward of this one."""
        return self.memory[: self.filled].to(dtype, copy=True), self.memory_labels[: self.filled].clone()

    def _enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        kept = min(len(labels), self.memory_size)
        first, end = len(labels) - kept, self._enqueued + len(labels)
        rows = torch.arange(end - kept, end, device=labels.device) % self.memory_size
        self.memory[rows] = embeddings[first:].to(self.memory.dtype)
        self.memory_labels[rows] = labels[first:]
        self._enqueued = end
