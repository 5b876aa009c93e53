"""Pictures: reading any kind of file, writing, resizing, luminance.

A picture is a float32 tensor [3, H, W], RGB in [0, 1]; a mask is one of [H, W]. Pillow is imported only where
files are read and written.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks.tensors import FLOAT_DTYPES, is_dense
from .._checks.texts import describe, error
from .._files import write_beside

if TYPE_CHECKING:
    from PIL import Image

# 12 bytes each once they are floats. Pillow has limits of its own, which are higher.
PIXEL_LIMIT = 80_000_000
JPEG_QUALITY = 95
HALF_LEVEL = 0.5 / 255  # by which a tensor may leave [0, 1]: it is rounded away
LUMINANCE = (0.299, 0.587, 0.114)  # Y of YIQ (ITU-R BT.601)

Picture = Any  # a path, a PIL image, an array uint8 [H, W] or [H, W, 3], or a tensor [3, H, W] in [0, 1]


# ---- what came in ------------------------------------------------------------------------------------------


def as_picture(picture: Picture, argument: str) -> Tensor:
    """Float32 [3, H, W] of whatever was passed; errors name `argument`."""
    if isinstance(picture, (str, Path)):
        return read_picture(picture)
    if isinstance(picture, Tensor):
        squeezed = picture[0] if picture.ndim == 4 and len(picture) == 1 else picture
        if (
            is_dense(squeezed, FLOAT_DTYPES)
            and squeezed.ndim == 3
            and len(squeezed) == 3
            and squeezed.numel()
        ):
            low, high = (value.item() for value in squeezed.aminmax())
            if not (low >= -HALF_LEVEL and high <= 1 + HALF_LEVEL):  # NaN too
                expected, got = "finite and within [0, 1]", f"values from {low:g} to {high:g}"
                raise error(ValueError, "stylize", argument, expected, got)
            return squeezed.detach().float().cpu()
    elif isinstance(picture, np.ndarray):
        shaped = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)
        if shaped and picture.size and picture.dtype == np.uint8:
            return to_tensor(np.repeat(picture[..., None], 3, axis=2) if picture.ndim == 2 else picture)
    elif hasattr(picture, "convert"):
        return _converted(picture, argument, background=1.0)
    expected = "a path, a PIL image, uint8 [H, W, 3] or a float tensor [3, H, W]"
    raise error(TypeError, "stylize", argument, expected, _described(picture))


def as_mask(mask: Picture, argument: str) -> Tensor:
    """Float32 [H, W] in [0, 1] of whatever was passed: a picture's luminance, 0 where it is transparent."""
    if isinstance(mask, (str, Path)):
        return luminance(_converted(_opened(mask), mask, background=0.0))[0]
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.numel() and not mask.is_complex():
        return mask.detach().float().clamp(0, 1).cpu()
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.size and mask.dtype in (np.uint8, bool):
        return torch.from_numpy(mask.astype(np.float32) / (255 if mask.dtype == np.uint8 else 1))
    if hasattr(mask, "convert"):
        return luminance(_converted(mask, argument, background=0.0))[0]
    expected = "a path, a PIL image, uint8 or bool [H, W] or a tensor [H, W]"
    raise error(TypeError, "stylize", argument, expected, _described(mask))


def read_picture(path: str | Path) -> Tensor:
    """The picture in a file, turned as its EXIF orientation says; transparency becomes white.

    Greyscale, palettes, CMYK and grey of 16 bits come as RGB like everything else; of an animation, the first
    frame. Colour profiles are not applied.

    Raises:
        ValueError: the file cannot be read, is no picture, or has more than `PIXEL_LIMIT` pixels.
    """
    return _converted(_opened(path), path, background=1.0)


def _opened(path: str | Path) -> Image.Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # about limits of Pillow's own
            with Image.open(path) as image:
                width, height = image.size
                if width * height > PIXEL_LIMIT:
                    raise Image.DecompressionBombError(f"{width} x {height}")
                image.load()
                return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not a picture that Pillow can read") from None
    except Image.DecompressionBombError as size:
        limit = f"more than {PIXEL_LIMIT / 1e6:.0f} million pixels"
        raise ValueError(f"{path}: {limit}: {_first_line(size)}") from None
    except Exception as problem:  # decoders meet broken files with errors of every kind
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
        raise ValueError(f"{path}: cannot be read: {_first_line(reason)}") from None


def _converted(image: Image.Image, name: str | Path, background: float) -> Tensor:
    """[3, H, W] of a PIL image over grey of the level `background`."""
    if image.mode.startswith("I"):  # grey of 16 bits, in whatever order of bytes
        grey = np.asarray(image.convert("I"))
        if grey.max() > 65535 or grey.min() < 0:
            raise ValueError(f"{name}: expected grey of at most 16 bits, got {grey.min()} to {grey.max()}")
        return torch.from_numpy(grey.astype(np.float32) / 65535).expand(3, *grey.shape).contiguous()
    if image.mode == "F":
        raise ValueError(f"{name}: expected 8 or 16 bits, got floating point, whose range no file says")
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        straight = image.convert("LA") if image.mode == "La" else image
        rgba = to_tensor(np.asarray(straight.convert("RGBA")))
        return rgba[:3] * rgba[3:] + background * (1 - rgba[3:])
    return to_tensor(np.asarray(image.convert("RGB")))


def _first_line(problem: object) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else describe(value)


# ---- what goes out -----------------------------------------------------------------------------------------


def to_tensor(array: np.ndarray) -> Tensor:
    """uint8 [H, W, C] to float32 [C, H, W] in [0, 1]."""
    return torch.from_numpy(array.transpose(2, 0, 1).astype(np.float32, order="C")) / 255


def to_array(picture: Tensor) -> np.ndarray:
    """[3, H, W] to uint8 [H, W, 3], rounded and clipped."""
    return (picture.detach() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def check_output(path: Path) -> None:
    """ValueError unless a picture can be written there, by name and folder."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"{path}: expected the name of a picture such as out.png or out.jpg")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent}")


def write_picture(picture: Tensor, path: Path) -> None:
    """Writes [3, H, W] in the format that the name says."""
    from PIL import Image

    kind = Image.registered_extensions()[path.suffix.lower()]
    options = {"quality": JPEG_QUALITY} if kind in ("JPEG", "WEBP") else {}
    write_beside(path, lambda file: Image.fromarray(to_array(picture)).save(file, format=kind, **options))


# ---- sizes -------------------------------------------------------------------------------------------------


def fitted(size: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of that shape whose longer one is `size`."""
    longer = max(height, width)
    return max(1, round(size * height / longer)), max(1, round(size * width / longer))


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """[C, H, W] at another size, by a bicubic filter that averages over what gets smaller."""
    if picture.shape[1:] == (height, width):
        return picture
    scaled = F.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)
    return scaled[0].clamp(0, 1)


# ---- luminance ---------------------------------------------------------------------------------------------


def luminance(picture: Tensor) -> Tensor:
    """[1, H, W] of [3, H, W]."""
    weights = torch.tensor(LUMINANCE, dtype=picture.dtype, device=picture.device)
    return (weights[:, None, None] * picture).sum(dim=0, keepdim=True)


def matched_luminance(style: Tensor, content: Tensor) -> Tensor:
    """Luminance [1, H, W] of the style with mean and deviation of the content's.

    Source: Gatys, Bethge, Hertzmann, Shechtman, "Preserving Color in Neural Artistic Style Transfer" (2016),
    section 4.
    """
    s, c = luminance(style), luminance(content)
    # A contrast of less than one level of 255 is rounding; it is not blown up.
    scale = c.std(correction=0) / s.std(correction=0).clamp_min(1 / 255)
    return (s - s.mean()) * scale + c.mean()


def with_luminance(picture: Tensor, values: Tensor) -> Tensor:
    """The picture [3, H, W] with luminance [1, H, W]: brighter and darker, its chroma unchanged.

    Where a colour would leave [0, 1], luminance stops there.
    """
    chroma = picture - luminance(picture)
    lowest, highest = -chroma.amin(dim=0, keepdim=True), 1 - chroma.amax(dim=0, keepdim=True)
    return chroma + values.clamp(lowest, highest)
