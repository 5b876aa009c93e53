"""scikit-learn's digits: the scans, classes that are made of them, and a small network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBEDDING_SIZE = 128


def load_images() -> tuple[Tensor, Tensor]:
    """All 1797 scans, float64 [N, 1, 8, 8] in 0-1, and their digits, int64 [N]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images[:, None] / 16.0), torch.from_numpy(digits.target).long()


def build_network(seed: int = 0) -> nn.Sequential:
    """[N, 1, 8, 8] to [N, EMBEDDING_SIZE], float64, the same weights every time for a seed."""

    def block(c_in: int, c_out: int) -> list[nn.Module]:
        return [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.GELU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *block(1, 16),
            *block(16, 32),
            nn.AvgPool2d(2),
            *block(32, 64),
            *block(64, 64),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, EMBEDDING_SIZE, bias=False),
            # Keeps every coordinate spread out: without it batch-hard training tends to pull all embeddings
            # into one point, where the loss rests at the margin.
            nn.BatchNorm1d(EMBEDDING_SIZE, affine=False),
        )
    return network.double()


def embed(network: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [N, EMBEDDING_SIZE] on the unit sphere."""
    network.eval()
    with torch.no_grad():
        return F.normalize(network(images))


class Sampler:
    """Batches of P classes x K images, made of the digits that are given.

    Less than ten are too few to learn what tells classes apart that were never seen. As Omniglot's alphabets
    are multiplied by turning them, digits are multiplied here by setting the upper half of one on the lower
    half of another, upright or turned by a quarter: 2 n n classes of n digits. Each image is also shifted,
    turned, stretched and sheared a little.
    """

    def __init__(self, images: Tensor, digits: Tensor, seed: int = 1) -> None:
        self.by_digit = [images[digits == digit] for digit in digits.unique()]
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, classes: int, images_per_class: int) -> tuple[Tensor, Tensor]:
        """Images [P K, 1, 8, 8] and labels, int64 [P K]."""
        n = len(self.by_digit)
        chosen = torch.randperm(2 * n**2, generator=self.generator)[:classes]
        labels = chosen.repeat_interleave(images_per_class)
        upper, lower = labels % n, labels // n % n
        turned = labels >= n**2
        tops, bottoms = self._draw(upper), self._draw(lower)
        whole = upper == lower
        bottoms[whole] = tops[whole]  # one scan
        images = self.distort(torch.cat([tops[:, :, :4], bottoms[:, :, 4:]], dim=2))
        images[turned] = images[turned].rot90(dims=(2, 3))
        return images, labels

    def distort(self, images: Tensor) -> Tensor:
        """The images, each under a small random affine map: up to 14 degrees, 10 %, one pixel."""

        def uniform(limit: float) -> Tensor:
            noise = torch.rand(len(images), generator=self.generator, dtype=images.dtype)
            return limit * (2.0 * noise - 1.0)

        angle, shear = uniform(0.25), uniform(0.2)
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
        stretch = torch.diag_embed(torch.stack([1 + uniform(0.1), 1 + uniform(0.1)], -1))
        stretch[:, 0, 1] = shear
        shift = torch.stack([uniform(0.25), uniform(0.25)], -1)[:, :, None]
        maps = torch.cat([rotation @ stretch, shift], -1)
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    def _draw(self, digits: Tensor) -> Tensor:
        pools = [self.by_digit[digit] for digit in digits.tolist()]
        return torch.stack([p[torch.randint(len(p), (), generator=self.generator)] for p in pools])
