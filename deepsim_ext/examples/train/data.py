"""What is trained on: scikit-learn's digits or a folder of images; what is held out; small random changes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ...demo.digits import load_images
from ...stylize.pictures import read_picture, resized

DIGITS = "digits"
LEAST_HELD_OUT = LEAST_TRAINED = 2  # images of a class: an image and one to find


class Data(NamedTuple):
    images: Dataset  # of (float32 [C, H, W] in [0, 1], label)
    labels: Tensor  # int64 [N], from 0
    classes: list[str]
    shape: tuple[int, int, int]  # C, H, W
    fingerprint: str  # of names and labels; not of pixels


def load(name: str, size: int) -> Data:
    """Digits, or the images of a folder's subfolders, one per class, as squares of `size`.

    Raises:
        ImportError: scikit-learn is missing, or Pillow.
        ValueError: no such folder, or a class without two images.
    """
    if name == DIGITS:
        images, labels = load_images()
        classes = [str(digit) for digit in range(10)]
        names = [str(i) for i in range(len(labels))]
        data = TensorDataset(images.float(), labels)
        return Data(data, labels, classes, (1, 8, 8), _fingerprint(names, labels))
    by_class = _image_paths(Path(name))
    paths = [path for mine in by_class.values() for path in mine]
    sizes = torch.tensor([len(mine) for mine in by_class.values()])
    labels = torch.arange(len(sizes)).repeat_interleave(sizes)
    names = [path.relative_to(name).as_posix() for path in paths]
    data = ImageFiles(paths, labels, size)
    return Data(data, labels, [*by_class], (3, size, size), _fingerprint(names, labels))


class ImageFiles(Dataset):
    """Images that are read when they are asked for: the largest square in the middle, resized."""

    def __init__(self, paths: list[Path], labels: Tensor, size: int) -> None:
        self.paths, self.labels, self.size = paths, labels, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = read_picture(self.paths[index])
        side = min(picture.shape[1:])
        top, left = ((n - side) // 2 for n in picture.shape[1:])
        square = picture[:, top : top + side, left : left + side]
        return resized(square, self.size, self.size), self.labels[index]


def _image_paths(folder: Path) -> dict[str, list[Path]]:
    from PIL import Image

    if not folder.is_dir():
        raise ValueError(f"--data: {folder}: no such folder")
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    by_class = {
        path.name: sorted(image for image in path.iterdir() if image.suffix.lower() in suffixes)
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    if not by_class:
        raise ValueError(f"--data: {folder}: expected a subfolder of images for each class, got none")
    few = [f"{name} has {len(images)}" for name, images in by_class.items() if len(images) < LEAST_TRAINED]
    if few:
        more = f" and {len(few) - 3} more" if len(few) > 3 else ""
        raise ValueError(f"--data: {folder}: each class needs 2 images; {', '.join(few[:3])}{more}")
    return by_class


def _fingerprint(names: list[str], labels: Tensor) -> str:
    lines = (f"{name}\t{label}\n" for name, label in zip(names, labels.tolist(), strict=True))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Which rows to train on and which to hold out, both int64 and ascending.

    About that fraction of each class is held out, so that two stay on either side; none of a class that has
    less than four, and none for a fraction of 0.
    """
    generator = np.random.default_rng(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = generator.permutation((labels == label).nonzero()[:, 0].numpy())
        count = min(max(LEAST_HELD_OUT, round(fraction * len(rows))), len(rows) - LEAST_TRAINED)
        if fraction > 0 and count >= LEAST_HELD_OUT:
            held_out[rows[:count]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def augmented(images: Tensor, noise: Tensor) -> Tensor:
    """Images [N, C, H, W], each turned by up to 10 degrees, resized and shifted by up to a tenth.

    Args:
        noise: float32 [N, 4], uniform in [0, 1): angle, scale, and shift along either axis.
    """
    angle, scale, x, y = (2 * noise - 1).mul(noise.new_tensor([0.175, 0.1, 0.2, 0.2])).to(images.device).T
    cos, sin = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    maps = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
