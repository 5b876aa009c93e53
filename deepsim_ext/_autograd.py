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

    The op itself gets the formula, for torch.compile and for those who call the op. The returned function
    goes through an autograd.Function with the same formula: for torch.func's transforms in the form that they
    ask for, otherwise in the older one, which takes a fraction of the time, most of which small batches take.
    """
    overload = getattr(torch.ops.deepsim_ext, op).default
    torch.library.register_autograd(f"deepsim_ext::{op}", backward, setup_context=setup_context)
    register_vmap_by_loop(op)
    transformable = type(
        op,
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *args: overload(*args)),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )

    def without_gradient(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # whose detour is for those who call the op
            return overload(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = without_gradient(*args)
        setup_context(ctx, args, output)
        return output

    plain = type(
        op,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*args)
        if torch._C._are_functorch_transforms_active():
            return transformable.apply(*args)
        wanted = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        # Forward-mode gradients are not offered: Function.apply says so, where there are any.
        if wanted or torch.autograd.forward_ad._current_level >= 0:
            return plain.apply(*args)
        return without_gradient(*args)

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
