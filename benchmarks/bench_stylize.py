"""One step of style transfer on a 256x256 picture: VGG19 forward, losses, gradient by the picture.

VGG19 takes nearly all of it, so this says what the style loss is worth to who stylises pictures, not what it
is worth by itself (bench_style.py). Preset gatys_paper's layers, normalised Gram matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

import deepsim_ext
from deepsim_ext.vgg import VGG19Features

from . import baselines
from .memory import memory_record
from .report import Bar
from .timing import Contender, Inputs, Record, add_rates, fresh_leaves, measure

NAME = "stylize"
SIDE = 256
CASE = f"step {SIDE}x{SIDE}"
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
CONTENT_LAYER = "relu4_2"
STYLE_WEIGHT = 1e3


@cache
def network(dtype: torch.dtype) -> VGG19Features:
    """Random filters: as fast as trained ones, and there without them."""
    return VGG19Features([*STYLE_LAYERS, CONTENT_LAYER], pooling="average", weights="random").to(dtype)


def draw(side: int) -> Inputs:
    """A picture, and the targets of two others."""
    pictures = [torch.rand(1, 3, side, side) for _ in range(3)]
    with torch.no_grad():
        style, content = (network(torch.float32)(picture) for picture in pictures[1:])
        grams = [baselines.gram_eager(style[layer]) for layer in STYLE_LAYERS]
    return Inputs(pictures[:1], [*grams, content[CONTENT_LAYER]])


def step(
    style_loss: Callable[[list[Tensor], list[Tensor]], Tensor], leaves: list[Tensor], constants: list[Tensor]
) -> Tensor:
    """Content and style loss of the picture."""
    features = network(leaves[0].dtype)(leaves[0])
    *grams, content = constants
    style = style_loss([features[layer] for layer in STYLE_LAYERS], grams)
    return STYLE_WEIGHT * style + deepsim_ext.content_loss(features[CONTENT_LAYER], content)


def contenders() -> list[Contender]:
    return [
        Contender("deepsim_ext", partial(step, deepsim_ext.style_loss), min_runs=15),
        Contender("torch eager", partial(step, baselines.style_eager), min_runs=15),
        Contender("one-GEMM Function", partial(step, baselines.style_one_gemm), min_runs=15),
    ]


EXACT = Contender("float64", partial(step, baselines.style_eager))


def probe(name: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One step of the contender `name`, and a small one to warm up (see memory.py)."""
    contender = next(c for c in contenders() if c.name == name)

    def once(side: int) -> Callable[[], object]:
        inputs = draw(side)
        leaves = fresh_leaves(contender, inputs)
        return lambda: contender.function(leaves, inputs.constants).backward()

    return once(SIDE), once(32)


def time_case(seconds: float) -> list[Record]:
    torch.manual_seed(0)
    measured = measure(contenders(), lambda: draw(SIDE), EXACT, seconds=seconds)
    add_rates(measured, {}, product="", baseline="torch eager")
    return [{"op": NAME, "kind": "time", "case": CASE} | record for record in measured]


def memory_case() -> list[Record]:
    return [
        {"op": NAME, "kind": "memory", "case": CASE} | memory_record(c, 0, f"{__name__}:probe", c.name)
        for c in contenders()
    ]


def jobs(quick: bool) -> list[tuple[str, Callable[[], list[Record]]]]:
    """What there is to measure, each with its name; nothing is quick."""
    if quick:
        return []
    return [(f"{NAME} {CASE}", partial(time_case, 10.0)), (f"memory {NAME} {CASE}", memory_case)]


def bars(records: list[Record]) -> list[Bar]:
    """What the project promises, with the measured figures."""
    time = {r["contender"]: r["p50_ms"] for r in records if r.get("phase") == "both" and r.get("valid", True)}
    memory = {r["contender"]: r["peak_bytes"] for r in records if "peak_bytes" in r}

    def over(values: dict[str, float]) -> float | None:
        both = [values.get(name) for name in ("deepsim_ext", "torch eager")]
        return None if None in both else both[0] / both[1]

    return [
        Bar(f"{NAME} {CASE}, time over that with torch's style loss", over(time), at_most=1),
        Bar(f"{NAME} {CASE}, peak memory over that with torch's style loss", over(memory), at_most=1),
    ]
