"""How an op gets its gradient and its batching rule: once for every way in which torch calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> Callable[..., Any]:
    """Registers the gradient of torch.ops.deepsim_ext.<op> and returns the op as a function to call.

    The op itself gets the formula, for torch.compile and for those who call the op; the returned function
    goes through an autograd.Function with the same formula, which torch.func's transforms ask for.
    """
    overload = getattr(torch.ops.deepsim_ext, op).default
    torch.library.register_autograd(f"deepsim_ext::{op}", backward, setup_context=setup_context)
    register_vmap_by_loop(op)
    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(lambda *args: overload(*args)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    function = type(op, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        return overload(*args) if torch.compiler.is_compiling() else function.apply(*args)

    return call


def register_vmap_by_loop(op: str) -> None:
    """Lets torch.vmap call `op` sample by sample and stack what comes out: one sample fills the machine."""
    overload = getattr(torch.ops.deepsim_ext, op).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"{op}: torch.vmap needs at least one sample, got a batch of 0")
        results = [
            overload(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(f"deepsim_ext::{op}", rule)
