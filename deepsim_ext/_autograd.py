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
    if any(str(a.type) == "List[Tensor]" for a in overload._schema.arguments):
        apply, setup_context, backward, unpack = _with_lists(setup_context, backward)
    else:
        apply, unpack = (lambda function, args: function.apply(*args)), (lambda args: args)
    transformable = type(
        op,
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *args: overload(*unpack(args))),
            "setup_context": staticmethod(setup_context),
            "backward": staticmethod(backward),
        },
    )

    def without_gradient(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # whose detour is for those who call the op
            return overload(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = without_gradient(*unpack(args))
        setup_context(ctx, args, output)
        return output

    plain = type(
        op,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    @torch.compiler.allow_in_graph  # as it is: torch.compile does not see through such a Function
    def transformed(*args: Any) -> Any:
        return apply(transformable, args)

    def call(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return transformed(*args)
        # Forward-mode gradients are not offered: Function.apply says so, where there are any.
        forward_mode = torch.autograd.forward_ad._current_level >= 0
        if torch.compiler.is_compiling() and not forward_mode:
            return overload(*args)
        if forward_mode or (torch.is_grad_enabled() and any(map(_requires_grad, args))):
            return apply(plain, args)
        return without_gradient(*args)

    return call


def _requires_grad(argument: Any) -> bool:
    if _is_list(argument):
        return any(map(_requires_grad, argument))
    return isinstance(argument, Tensor) and argument.requires_grad


def _is_list(argument: Any) -> bool:
    return isinstance(argument, list) and len(argument) > 0 and isinstance(argument[0], Tensor)


def _with_lists(setup_context: Callable[..., None], backward: Callable[..., Any]) -> tuple[Any, ...]:
    """What an op with lists of tensors needs, for autograd.Function sees tensors only among its arguments.

    Returns apply(function, args), which hands on the elements of lists one by one, after a tuple that says
    which they were; `setup_context` and `backward` with such arguments; and unpack, from these to the op's.
    """

    def apply(function: Any, args: tuple[Any, ...]) -> Any:
        lengths = tuple(len(a) if _is_list(a) else None for a in args)
        elements = [element for a in args for element in (a if _is_list(a) else [a])]
        return function.apply(lengths, *elements)

    def unpack(packed: tuple[Any, ...]) -> tuple[Any, ...]:
        lengths, *elements = packed
        rest = iter(elements)
        return tuple(next(rest) if n is None else [next(rest) for _ in range(n)] for n in lengths)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.lengths = inputs[0]
        setup_context(ctx, unpack(inputs), output)

    def packed_backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = unpack((ctx.lengths, *needs[1:]))
        try:
            results = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needs
        pairs = zip(ctx.lengths, results, strict=True)
        return None, *(element for n, r in pairs for element in ([r] if n is None else r))

    return apply, setup, packed_backward, unpack


def register_vmap_by_loop(op: str) -> None:
    """Lets torch.vmap call `op` sample by sample and stack what comes out: one sample fills the machine."""
    overload = getattr(torch.ops.deepsim_ext, op).default

    def sample(argument: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, list | tuple):  # one for each element of a list
            return [sample(a, d, i) for a, d in zip(argument, dim, strict=True)]
        return argument if dim is None else argument.select(dim, i)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"{op}: torch.vmap needs at least one sample, got a batch of 0")
        results = [
            overload(*(sample(a, dim, i) for a, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(outputs) for outputs in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    torch.library.register_vmap(f"deepsim_ext::{op}", rule)
