"""Style loss over the VGG19 layers conv1_1 ... conv5_1 of 256x256 and 512x512 images, 1 and 4, float32.

Nominal work, C channels and N = H W: forward 2 C^2 N FLOPs (the full Gram matrix), backward 2 C^2 N (one
product D F), both 4 C^2 N, for every contender: who computes half of the symmetric Gram matrix shows a higher
rate, who runs two products backward a lower one. The yardstick is one `torch.mm(F, F.T)` per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import deepsim_ext
from tests.samples import VGG19_LAYERS

from . import baselines
from .memory import memory_record
from .report import Bar
from .timing import Contender, Inputs, Record, add_rates, fresh_leaves, measure

NAME = "style"
PRODUCT = "torch.mm(F, F.T)"
ALL = "all layers"
IMAGE_SIZES = (256, 512)
BATCHES = (1, 4)


def case_name(image_size: int, layers: str = ALL, batch: int = 1) -> str:
    images = f"{batch} of {image_size}x{image_size}" if batch > 1 else f"{image_size}x{image_size}"
    return f"{images} {layers}"


def shapes(image_size: int, layers: str = ALL, batch: int = 1) -> list[tuple[int, int, int, int]]:
    chosen = VGG19_LAYERS.values() if layers == ALL else [VGG19_LAYERS[layers]]
    return [(batch, channels, image_size // factor, image_size // factor) for channels, factor in chosen]


def draw(feature_shapes: list[tuple[int, int, int, int]]) -> Inputs:
    """Positive features as after a ReLU; the style's channels have other scales: no difference vanishes."""
    features = [torch.randn(shape).abs_() for shape in feature_shapes]
    styles = [f[:, torch.randperm(f.shape[1])] * (0.5 + torch.rand(f.shape[1], 1, 1)) for f in features]
    return Inputs(features, [baselines.gram_eager(style) for style in styles])


def _products(features: list[Tensor], _: list[Tensor]) -> list[Tensor]:
    return [torch.mm(rows, rows.T) for f in features for rows in f.flatten(2)]


def contenders(skip_compile: str = "") -> list[Contender]:
    compiled = torch.compile(baselines.style_eager, dynamic=False)
    return [
        Contender(PRODUCT, _products, differentiable=False, min_runs=9),
        Contender("deepsim_ext", deepsim_ext.style_loss, min_runs=9),
        Contender("torch eager", baselines.style_eager, min_runs=9),
        Contender("torch.compile", compiled, skip=skip_compile),
        Contender("one-GEMM Function", baselines.style_one_gemm),
    ]


EXACT = Contender("float64", baselines.style_eager)


def probe(name: str, image_size: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One forward + backward of the contender `name`, and a small one to warm up (see memory.py)."""
    contender = next(c for c in contenders() if c.name == name)

    def step(size: int) -> Callable[[], object]:
        inputs = draw(shapes(size))
        leaves = fresh_leaves(contender, inputs)
        return lambda: contender.function(leaves, inputs.constants).backward()

    # A new shape would start the compiler, which is no part of the call.
    return step(int(image_size)), step(int(image_size) if name == "torch.compile" else 16)


def time_case(image_size: int, layers: str, batch: int, seconds: float, skip_compile: str) -> list[Record]:
    """One record per contender and phase."""
    torch.manual_seed(0)
    torch.compiler.reset()
    feature_shapes = shapes(image_size, layers, batch)
    measured = measure(contenders(skip_compile), lambda: draw(feature_shapes), EXACT, seconds=seconds)
    work = sum(2 * batch * channels**2 * height * width for _, channels, height, width in feature_shapes)
    flops = {"forward": work, "backward": work, "both": 2 * work}
    add_rates(measured, flops, product=PRODUCT, baseline="torch eager")
    case = case_name(image_size, layers, batch)
    return [{"op": NAME, "kind": "time", "case": case} | record for record in measured]


def memory_case(image_size: int) -> list[Record]:
    """One record per contender, over all layers; allowed is the gradient."""
    allowed = sum(math.prod(shape) for shape in shapes(image_size)) * torch.float32.itemsize
    return [
        {"op": NAME, "kind": "memory", "case": case_name(image_size)}
        | memory_record(contender, allowed, f"{__name__}:probe", contender.name, image_size)
        for contender in contenders()
        if contender.differentiable
    ]


def jobs(quick: bool) -> list[tuple[str, Callable[[], list[Record]]]]:
    """What there is to measure, each with its name."""
    seconds, skip_compile = (0.3, "left out by --quick") if quick else (1.0, "")
    # Compiling each layer takes longer than everything else together.
    skip_layer = skip_compile or f"compiled for {ALL} only"
    times = [
        (
            case_name(image_size, layers, batch),
            partial(
                time_case, image_size, layers, batch, seconds, skip_compile if layers == ALL else skip_layer
            ),
        )
        for image_size in (IMAGE_SIZES[:1] if quick else IMAGE_SIZES)
        for batch in (BATCHES[:1] if quick else BATCHES)
        for layers in ([ALL] if quick else [*VGG19_LAYERS, ALL])
    ]
    size = IMAGE_SIZES[-1]
    memory = [] if quick else [(f"memory {case_name(size)}", partial(memory_case, size))]
    return times + memory


def bars(records: list[Record]) -> list[Bar]:
    """What the project promises, with the measured figures."""
    p50 = {
        (r["case"], r["contender"], r["phase"]): r["p50_ms"]
        for r in records
        if "p50_ms" in r and r.get("valid", True)
    }

    def over(case: str, rival: str, phase: str = "both", rival_phase: str = "both") -> float | None:
        own, other = p50.get((case, "deepsim_ext", phase)), p50.get((case, rival, rival_phase))
        return None if own is None or other is None else own / other

    result = []
    large = IMAGE_SIZES[-1]
    for channels in (256, 512):
        layer = next(name for name, (c, _) in VGG19_LAYERS.items() if c == channels)
        case = case_name(large, layer)
        text = f"style {case} (C={channels}), forward over one {PRODUCT}"
        result.append(Bar(text, over(case, PRODUCT, "forward", "forward"), at_most=0.65))
    cases = [(size, batch) for size in IMAGE_SIZES for batch in BATCHES]
    for rival, limit in (("torch eager", 2.9), ("one-GEMM Function", 1.2)):
        ratios = [over(case_name(size, ALL, batch), rival) for size, batch in cases]
        mean = None if None in ratios else 1 / math.prod(ratios) ** (1 / len(ratios))
        text = f"style, all layers, speed-up over {rival} (geometric mean of 256x256 and 512x512, 1 and 4)"
        result.append(Bar(text, mean, at_least=limit))
        ratio = over(case_name(large), rival)
        result.append(
            Bar(f"style {case_name(large)}, speed-up over {rival}", ratio and 1 / ratio, at_least=limit)
        )
        layers = [
            over(case_name(size, layer, batch), rival) for size, batch in cases for layer in VGG19_LAYERS
        ]
        slowest = None if None in layers else max(layers)
        result.append(Bar(f"style, slowest layer over {rival}", slowest, at_most=1))
    beyond = next(
        (
            r.get("beyond_bytes")
            for r in records
            if r["kind"] == "memory" and r["contender"] == "deepsim_ext" and r["case"] == case_name(large)
        ),
        None,
    )
    largest = max(math.prod(shape) for shape in shapes(large)) * torch.float32.itemsize
    text = f"style {case_name(large)}, peak beyond the gradient over the bytes of the largest layer"
    return [*result, Bar(text, None if beyond is None else beyond / largest, at_most=1)]
