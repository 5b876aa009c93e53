"""Presets against the packages they stand for, as installed: piq and pystiche.

Both import torchvision for pretrained networks, which no loss needs: here networks are random, and a stand-in
without any code takes torchvision's place while the packages are imported. `make test` installs them without
their dependencies, so that torchvision brings no other torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from deepsim_ext import total_variation_loss
from deepsim_ext.nn import StyleTransferLoss

# Modules of torchvision that the two packages import, and what pystiche looks up in two of them.
TORCHVISION = {
    "torchvision": {},
    "torchvision.datasets": {},
    "torchvision.datasets.folder": {},
    "torchvision.datasets.utils": {},
    "torchvision.models": {},
    "torchvision.models.alexnet": {"model_urls": {"alexnet": ""}},
    "torchvision.models.inception": {},
    "torchvision.models.vgg": {"model_urls": {}},
    "torchvision.transforms": {},
    "torchvision.transforms.functional": {},
}


class StandIn(ModuleType):
    """Has every name that is asked for: an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def imported(package: str) -> ModuleType:
    """The package, on a stand-in for torchvision where there is none; other tests find neither."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install --no-deps {package}")
    before = set(sys.modules)
    if importlib.util.find_spec("torchvision") is None:
        for name, values in TORCHVISION.items():
            sys.modules[name] = StandIn(name)
            vars(sys.modules[name]).update(values)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])
    try:
        return importlib.import_module(package)
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("torchvision", package):
                del sys.modules[name]


@pytest.fixture(scope="module")
def piq() -> ModuleType:
    return imported("piq")


@pytest.fixture(scope="module")
def pystiche() -> ModuleType:
    return imported("pystiche")


def network(channels: int = 6) -> nn.Sequential:
    """Three random layers in float64, the last at half the size."""
    torch.manual_seed(0)
    layers = [
        ("first", nn.Conv2d(3, 5, 3, padding=1)),
        ("second", nn.ReLU()),
        ("third", nn.Conv2d(5, channels, 3, padding=1, stride=2)),
    ]
    return nn.Sequential(OrderedDict(layers)).double().requires_grad_(False)


def features(net: nn.Sequential, image: Tensor) -> dict[str, Tensor]:
    result = {}
    for name, layer in net.named_children():
        image = layer(image)
        result[name] = image
    return result


def pictures(*sizes: tuple[int, int], b: int = 1) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.rand(b, 3, *size, generator=g, dtype=torch.float64) for size in sizes]


def assert_same(ours: Tensor, theirs: Tensor, image: Tensor) -> None:
    """Loss and gradient."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    a, b = (torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in (ours, theirs))
    assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("b", [1, 3])
def test_piq(piq, b):
    net = network()
    options = {"feature_extractor": net, "layers": ["second", "third"], "mean": [0.0] * 3, "std": [1.0] * 3}
    image, style = pictures((9, 11), (9, 11), b=b)
    image.requires_grad_()
    ours = StyleTransferLoss.from_preset(
        "piq", style_layers=("second", "third"), content_layers=(), style_layer_weights=[0.5, 2.0]
    )
    ours.set_style(features(net, style))
    theirs = piq.StyleLoss(weights=[0.5, 2.0], **options)
    assert_same(ours(features(net, image)), theirs(image, style), image)


def test_piq_content(piq):
    """Which it sums over channels, 256 in the layer that it takes."""
    net = network(channels=256)
    image, content = pictures((9, 11), (9, 11), b=2)
    image.requires_grad_()
    ours = StyleTransferLoss.from_preset("piq", content_layers=("third",), style_weight=0)
    ours.set_content(features(net, content))
    theirs = piq.ContentLoss(feature_extractor=net, layers=["third"], mean=[0.0] * 3, std=[1.0] * 3)
    assert_same(ours(features(net, image)), theirs(image, content), image)


@pytest.mark.parametrize(("distance", "norm"), [("l1", "l1"), ("l2", "l2_squared")])
def test_piq_total_variation(piq, distance, norm):
    (image,) = pictures((5, 7), b=2)
    image.requires_grad_()
    ours = total_variation_loss(image, distance=distance, reduction="sum")
    assert_same(ours, piq.total_variation(image, norm_type=norm, reduction="sum"), image)


@pytest.mark.parametrize("b", [1, 3])
def test_pystiche(pystiche, b):
    net = network()
    encoder = pystiche.enc.MultiLayerEncoder(list(net.named_children()))
    layers = ("first", "second", "third")
    image, content = pictures((9, 11), (9, 11), b=b)
    (style,) = pictures((14, 8))  # of another size, for all images
    image.requires_grad_()
    # `style_layers` of the preset are five; its weight of a layer is 1/5, as the mean over five is.
    ours = StyleTransferLoss.from_preset(
        "pystiche", style_layers=layers, content_layers=("third",), style_layer_weights=[1 / 3] * 3
    )
    ours.set_style(features(net, style))
    ours.set_content(features(net, content))
    loss = pystiche.loss
    theirs = loss.PerceptualLoss(
        loss.FeatureReconstructionLoss(encoder.extract_encoder("third")),
        loss.MultiLayerEncodingLoss(
            encoder,
            layers,
            lambda layer, weight: loss.GramLoss(layer, score_weight=weight),
            layer_weights="mean",
            score_weight=1e3,
        ),
    )
    theirs.set_style_image(style)
    theirs.set_content_image(content)
    assert_same(ours(features(net, image)), theirs(image).total(), image)
