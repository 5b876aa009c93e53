"""L-BFGS for pictures: one evaluation a step, in steps of bounded length."""

from __future__ import annotations

import torch
from torch import Tensor

HISTORY = 10  # pairs of steps and changes of the gradient that are kept
# In mean absolute change of a value in [0, 1]. While nothing is known of the curvature, or it is negative as
# around grey, steps start at one level of 255 and double.
FIRST_STEP, LONGEST_STEP = 1 / 255, 0.1
LEAST_CURVATURE = 1e-8  # as the cosine between a step and the change of the gradient along it


class LBFGS(torch.optim.Optimizer):
    """L-BFGS without line search: `step` takes the gradient as it finds it, and never evaluates.

    torch.optim.LBFGS measures its first step in the units of its parameters and bounds no other. Between two
    steps the point may be moved, back to where a step started for example: a step is what lies between the
    points at which `step` was called.
    Source: Nocedal, Wright, "Numerical Optimization" (2006), algorithm 7.4.

    Args:
        point: where to start; a leaf of any shape.
        lr: factor of every step, before it is bounded.
    """

    def __init__(self, point: Tensor, lr: float = 1.0) -> None:
        super().__init__([point], {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        (point,) = group["params"]
        gradient, state = point.grad, self.state[point]
        if not state:
            state.update(steps=[], changes=[], length=FIRST_STEP)
        else:
            _remember(state, point - state["point"], gradient - state["gradient"])
        move = -_product(state, gradient)
        if not _dot(move, gradient) < 0:  # by rounding alone
            state.update(steps=[], changes=[], length=FIRST_STEP)
            move = -gradient
        length = wish = move.abs().mean().item()
        if not state["steps"]:
            wish, state["length"] = state["length"], 2 * state["length"]
        if length > 0:
            move *= min(group["lr"] * wish, LONGEST_STEP) / length
        state["point"], state["gradient"] = point.clone(), gradient.clone()
        point.add_(move)


def _remember(state: dict, step: Tensor, change: Tensor) -> None:
    if _dot(step, change) > LEAST_CURVATURE * step.norm() * change.norm():
        state["steps"] = [*state["steps"], step][-HISTORY:]
        state["changes"] = [*state["changes"], change][-HISTORY:]


def _product(state: dict, gradient: Tensor) -> Tensor:
    """The inverse Hessian, as far as it is known, times the gradient."""
    pairs = list(zip(state["steps"], state["changes"], strict=True))
    found, factors = gradient.clone(), []
    for step, change in reversed(pairs):
        factors.append(_dot(step, found) / _dot(step, change))
        found -= factors[-1] * change
    if pairs:
        step, change = pairs[-1]
        found *= _dot(step, change) / _dot(change, change)
    for (step, change), factor in zip(pairs, reversed(factors), strict=True):
        found += (factor - _dot(change, found) / _dot(step, change)) * step
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())
