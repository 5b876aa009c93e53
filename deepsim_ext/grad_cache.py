"""Gradients of batches whose activations do not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import _checks
from .results import ContrastiveResult, TripletLossResult

Chunk = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
Result = TypeVar("Result", Tensor, TripletLossResult, ContrastiveResult)
RandomStates = list[Tensor]  # of the CPU and of every device


def cached_backward(
    model: nn.Module,
    inputs: Chunk | list[Chunk],
    loss: Callable[[Tensor], Result],
    *,
    chunk_size: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Result:
    """`loss(model(inputs)).backward()` in the memory of one chunk's activations.

        loss = cached_backward(model, images, lambda embeddings: criterion(embeddings, labels), chunk_size=64)
        optimizer.step()

    The model embeds chunk by chunk without a graph. From all embeddings come one loss and its gradient by
    them; with that each chunk, embedded once more, goes backward. So the loss sees the whole batch, the
    gradients are exact, and the price is a second forward pass. Source: Gao, Zhang, Han, Callan, "Scaling
    Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021).

    The second pass draws from torch the same random numbers as the first (dropout), starts with the same
    buffers, which the first one leaves as they were, and runs under the same autocast; backward runs outside
    of it. A model whose rows depend on each other sees chunks, not the batch: BatchNorm in training mode
    takes the statistics of each chunk and updates its running ones once for each.

    Under DistributedDataParallel gradients are all-reduced in the last chunk's backward, and ranks may have
    different numbers of chunks. Under `fully_shard` (FSDP2) all ranks need as many; each chunk's gradients
    are scattered at once, for whole ones to wait in would take the memory that sharding saves.

    Args:
        model: makes embeddings [n, D] of a chunk x: `model(x)`, `model(*x)` of a tuple, `model(**x)` of a
            dict.
        inputs: a tensor [N, ...], or a tuple or dict of such tensors, to be split into chunks; or a list of
            chunks, each as the model takes it, not necessarily of tensors.
        loss: from the embeddings of all chunks [N, D], in order, to a scalar or a named tuple with such a
            `loss`. Its own parameters, if any, get their gradients too.
        chunk_size: rows of a chunk, >= 1, the last one perhaps of fewer; None for a list of chunks.
        scaler: scales the loss before backward, for float16; `scaler.step` and `scaler.update` follow as
            ever.

    Returns:
        What `loss` returned, with the loss detached and not scaled. Gradients are added to those of the
        parameters, as `backward` does.

    Raises:
        TypeError, ValueError: for an argument that is none of the above, before any work; for embeddings that
            are not floating and [n, D] with n >= 1 or not all of one D; for a loss that is no scalar or does
            not depend on the embeddings; for a model of which nothing requires grad.
    """
    function = "cached_backward"
    chunks = _checks.cached_backward(function, model, inputs, loss, chunk_size=chunk_size, scaler=scaler)
    devices = _devices(model)
    parts: list[Tensor] = []
    states: list[RandomStates] = []
    with torch.no_grad(), _buffers_restored(model):
        for chunk in chunks:
            states.append(_random_states(devices))
            first = parts[0] if parts else None
            parts.append(_checks.chunk_embeddings(function, _embed(model, chunk), first))
        embeddings = torch.cat(parts).requires_grad_()
    sizes = [len(part) for part in parts]
    del parts

    result = loss(embeddings)
    value = _checks.loss_value(function, result)
    _backward(value if scaler is None else scaler.scale(value))
    if embeddings.grad is None:
        raise _checks.unrelated_loss(function)
    gradients = embeddings.grad.split(sizes)

    after = _random_states(devices)
    try:
        for i, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True)):
            _set_random_states(devices, state)
            with _local_gradients(model, only=i < len(chunks) - 1):
                _backward(_checks.trained_embeddings(function, _embed(model, chunk)), gradient)
    finally:
        _set_random_states(devices, after)
    return value.detach() if result is value else result._replace(loss=value.detach())


def _embed(model: nn.Module, chunk: Chunk) -> Tensor:
    if isinstance(chunk, Mapping):
        return model(**chunk)
    return model(*chunk) if isinstance(chunk, tuple) else model(chunk)


def _backward(output: Tensor, gradient: Tensor | None = None) -> None:
    """Outside autocast, which is for forward passes."""
    with torch.autocast("cpu", enabled=False), torch.autocast(output.device.type, enabled=False):
        output.backward(gradient)


@contextmanager
def _local_gradients(model: nn.Module, only: bool) -> Iterator[None]:
    """No all-reduce of DistributedDataParallel in here, wherever it stands in the model, if `only` that."""
    with ExitStack() as stack:
        for module in model.modules() if only else ():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """Leaves the buffers as they were, or as DistributedDataParallel's forward, which copies those of rank 0
    to all ranks, would find them."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.will_sync_module_buffers():
            for buffer in module.modules_buffers:
                torch.distributed.broadcast(buffer, group=module.process_group, group_src=0)
    found = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in found:
            setattr(module, name, buffer.copy_(value))


def _devices(model: nn.Module) -> list[torch.device]:
    """All that the model draws random numbers on, besides the CPU."""
    devices = {parameter.device for parameter in model.parameters()}
    return [device for device in devices if device.type not in ("cpu", "meta")]


def _random_states(devices: list[torch.device]) -> RandomStates:
    return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in devices)]


def _set_random_states(devices: list[torch.device], states: RandomStates) -> None:
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)
