"""Presets of style transfer: each against its source's formula, written out in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepsim_ext import (
    StylePreset,
    content_loss,
    gram_matrix,
    style_loss,
    style_preset,
    total_variation_loss,
)
from deepsim_ext.nn import StyleTransferLoss
from deepsim_ext.presets import _PRESETS


def product(f: Tensor) -> Tensor:
    """F F^T of the one sample there is."""
    rows = f[0].flatten(1)
    return rows @ rows.T


def sizes(f: Tensor) -> tuple[int, int]:
    return f.shape[1], f[0, 0].numel()


def gatys(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    def layer(f: Tensor, s: Tensor) -> Tensor:
        c, n = sizes(f)
        return weight * (product(f) - product(s)).square().sum() / (4 * c**2 * n**2)

    return layer


def course(f: Tensor, s: Tensor) -> Tensor:
    _, c, h, w = f.shape
    return 40 * 0.2 * (product(f) - product(s)).square().sum() / (2 * h * w * c) ** 2


def divided(weight: float, by: str, difference: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    def layer(f: Tensor, s: Tensor) -> Tensor:
        def gram(x: Tensor) -> Tensor:
            c, n = sizes(x)
            return product(x) / {"cn": c * n, "n": n, "1": 1}[by]

        return weight * difference(gram(f), gram(s))

    return layer


def film(f: Tensor, s: Tensor) -> Tensor:
    return F.mse_loss(product(f / 255) / sizes(f)[1], product(s / 255) / sizes(s)[1])


STYLE = {
    "gatys_paper": gatys(1e3 / 5),
    "ng_course": course,
    "sum": lambda f, s: (product(f) - product(s)).square().sum(),
    "pytorch_tutorial": divided(1e6, "cn", F.mse_loss),  # of one image: B = 1
    "jcjohnson": divided(100, "cn", F.mse_loss),
    "neural_style_pt": divided(100, "cn", F.mse_loss),
    "pytorch_examples": divided(1e10, "cn", F.mse_loss),
    "pystiche": divided(1e3 / 5, "n", F.mse_loss),
    "piq": divided(1, "1", F.mse_loss),
    "basicsr_l1": divided(1, "cn", F.l1_loss),
    "basicsr_l2": divided(1, "cn", F.mse_loss),
    "basicsr_frobenius": divided(1, "cn", lambda a, b: torch.linalg.matrix_norm(a - b)),
    "edgeconnect": divided(250, "cn", F.l1_loss),
    "film": film,
}
CONTENT = {
    "gatys_paper": lambda f, t: (f - t).square().sum() / 2,
    "ng_course": lambda f, t: 10 * (f - t).square().sum() / 2,
    "sum": lambda f, t: (f - t).square().sum(),
    "pytorch_tutorial": F.mse_loss,
    "jcjohnson": lambda f, t: 5 * F.mse_loss(f, t),
    "neural_style_pt": lambda f, t: 5 * F.mse_loss(f, t),
    "pytorch_examples": lambda f, t: 1e5 * F.mse_loss(f, t),
    "pystiche": F.mse_loss,
    "piq": lambda f, t: 256 * F.mse_loss(f, t),  # a sum over the 256 channels of relu3_3
}
VARIATION = {
    "jcjohnson": lambda x: 1e-3 * sum(d.square().sum() / 2 for d in (x.diff(dim=2), x.diff(dim=3))),
    "neural_style_pt": lambda x: 1e-3 * sum(d.abs().sum() for d in (x.diff(dim=2), x.diff(dim=3))),
}
BLOCKS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


def test_every_preset_has_its_formula():
    assert STYLE.keys() == _PRESETS.keys()
    assert CONTENT.keys() == {name for name, preset in _PRESETS.items() if preset.content_layers}
    assert VARIATION.keys() == {name for name, preset in _PRESETS.items() if preset.tv_weight}


@pytest.mark.parametrize("name", STYLE)
def test_style(name):
    preset = style_preset(name)
    g = torch.Generator().manual_seed(1)
    shapes = [(1, 5 + 2 * i, 9 - i, 11) for i in range(len(preset.style_layers))]
    features = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    # The style image need not be as large as the other.
    styles = [torch.randn((1, s[1], 9, 10), generator=g, dtype=torch.float64) * 1.5 for s in shapes]
    if preset.normalize == "none":
        styles = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    grams = [gram_matrix(s, normalize=preset.normalize) for s in styles]
    ours = preset.style_weight * style_loss(features, grams, **preset.style_options)
    theirs = sum(STYLE[name](f, s) for f, s in zip(features, styles, strict=True))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    for a, b in zip(torch.autograd.grad(ours, features), torch.autograd.grad(theirs, features), strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("name", CONTENT)
def test_content(name):
    preset = style_preset(name)
    f, t = torch.randn(2, 1, 6, 5, 7, dtype=torch.float64).unbind()
    f.requires_grad_()
    ours = preset.content_weight * content_loss(f, t, **preset.content_options)
    theirs = CONTENT[name](f, t)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours, f), torch.autograd.grad(theirs, f), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("name", VARIATION)
def test_total_variation(name):
    preset = style_preset(name)
    x = torch.randn(1, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    ours = preset.tv_weight * total_variation_loss(x, **preset.tv_options)
    theirs = VARIATION[name](x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x))


def by_layer(names: tuple[str, ...], scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """Features of a picture: every layer of its own size."""
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    return {name: scale * torch.randn(1, 3 + i, 9 - i, 11, **draw) for i, name in enumerate(names)}


@pytest.mark.parametrize("name", STYLE)
def test_the_whole_loss_is_the_sum_of_the_formulas(name):
    preset = style_preset(name)
    names = tuple(dict.fromkeys(preset.style_layers + preset.content_layers))
    criterion = StyleTransferLoss.from_preset(name)
    style, content = by_layer(names, 1.5, seed=1), by_layer(names, seed=2)
    features = {layer: f.requires_grad_() for layer, f in by_layer(names, seed=3).items()}
    image = torch.randn(1, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    leaves = [*features.values(), image]
    criterion.set_style(style)
    criterion.set_content(content)
    ours = criterion(features, image)
    theirs = sum(STYLE[name](features[n], style[n]) for n in preset.style_layers)
    theirs = theirs + sum(CONTENT[name](features[n], content[n]) for n in preset.content_layers)
    theirs = theirs + (VARIATION[name](image) if name in VARIATION else 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("name", STYLE)
def test_layers_are_those_of_the_network(name):
    preset = style_preset(name)
    assert isinstance(preset, StylePreset)
    for layer in preset.style_layers + preset.content_layers:
        kind, block, n = layer[:4], int(layer[4]), int(layer[6])
        assert kind in ("conv", "relu") and layer[5] == "_"
        assert 1 <= n <= BLOCKS[preset.network][block - 1]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gatys", ValueError, 'style_preset: name must be one of "gatys_paper", .* got "gatys"'),
        (3, TypeError, "style_preset: name must be one of .* got int 3"),
    ],
)
def test_unknown_names(name, error, message):
    with pytest.raises(error, match=message):
        style_preset(name)
