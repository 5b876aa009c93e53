"""A small convolutional network of embeddings."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._files import write_beside

GROUPS = 8  # of GroupNorm: every width is a multiple


class EmbeddingNetwork(nn.Module):
    """Images [N, C, H, W] to embeddings [N, D] on the unit sphere, float32.

    Args:
        channels: C.
        widths: channels of the stages, multiples of 8; each stage ends at half the height and width.
        embedding_size: D.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], embedding_size: int) -> None:
        super().__init__()
        self.options = {"channels": channels, "widths": widths, "embedding_size": embedding_size}
        layers: list[nn.Module] = []
        for width in widths:
            for c_in in (channels, width):
                layers += [nn.Conv2d(c_in, width, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, width)]
                layers += [nn.GELU()]
            layers += [nn.AvgPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.embedding = nn.Linear(channels, embedding_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.embedding(self.features(images).mean(dim=(2, 3))).float())


def build(shape: tuple[int, int, int], embedding_size: int, seed: int) -> EmbeddingNetwork:
    """A network for images of a shape [C, H, W], the same weights every time for a seed."""
    channels, height, _ = shape
    widths = (32, 64, 128, 256) if height >= 16 else (32, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EmbeddingNetwork(channels, widths, embedding_size)


def save(network: EmbeddingNetwork, path: Path) -> None:
    """Writes options and weights."""
    state = {"options": network.options, "weights": network.state_dict()}
    write_beside(path, lambda file: torch.save(state, file))


def load(path: str | Path) -> EmbeddingNetwork:
    """What `save` wrote."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = EmbeddingNetwork(**state["options"])
    network.load_state_dict(state["weights"])
    return network
