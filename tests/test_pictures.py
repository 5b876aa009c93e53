"""Pictures of every kind: what is read, written and refused."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from deepsim_ext._files import write_beside
from deepsim_ext.stylize import pictures
from deepsim_ext.stylize.pictures import (
    as_mask,
    as_picture,
    check_output,
    fitted,
    luminance,
    matched_luminance,
    read_picture,
    resized,
    to_array,
    to_tensor,
    with_luminance,
    write_picture,
)

Image = pytest.importorskip("PIL.Image", reason="needs the extra stylize")

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def corners() -> np.ndarray:
    """uint8 [20, 30, 3], an even colour in each quarter, so that JPEG keeps it."""
    array = np.zeros((20, 30, 3), np.uint8)
    array[:10, :15], array[:10, 15:], array[10:, :15], array[10:, 15:] = RED, GREEN, BLUE, (128, 128, 128)
    return array


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def colors(picture: torch.Tensor) -> list[list[int]]:
    """Of the four corners, from the upper left to the lower right."""
    return [(picture[:, y, x] * 255).round().int().tolist() for y, x in ((2, 2), (2, -3), (-3, 2), (-3, -3))]


# ---- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_rgb(tmp_path, name):
    path = saved(
        Image.fromarray(corners()), tmp_path / name, **({"lossless": True} if "webp" in name else {})
    )
    picture = read_picture(path)
    assert picture.dtype == torch.float32 and picture.is_contiguous()
    assert torch.equal(picture, torch.from_numpy(corners()).permute(2, 0, 1) / 255)
    assert torch.equal(as_picture(str(path), "content"), picture)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """The file holds the picture as a camera held that way would have; it is turned back."""
    upright = Image.fromarray(corners())
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation in turns else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.jpg"):
        picture = read_picture(saved(stored, tmp_path / name, exif=exif, quality=100, subsampling=0))
        assert picture.shape == (3, 20, 30)
        expected = torch.tensor([RED, GREEN, BLUE, (128, 128, 128)])
        assert (torch.tensor(colors(picture)) - expected).abs().max() <= 3


def test_lab(tmp_path):
    path = saved(Image.new("LAB", (2, 2), (255, 128, 128)), tmp_path / "a.tif")
    assert Image.open(path).mode == "LAB"
    assert (read_picture(path) > 253 / 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "YCbCr", "HSV", "RGBX"])
def test_modes_without_transparency(mode):
    image = Image.fromarray(corners()).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert (to_array(as_picture(image, "content")) == expected).all()
    if mode == "YCbCr":
        assert np.abs(expected.astype(int) - corners()).max() <= 2


def test_cmyk(tmp_path):
    path = saved(Image.fromarray(corners()).convert("CMYK"), tmp_path / "a.jpg", quality=100, subsampling=0)
    assert Image.open(path).mode == "CMYK"
    assert (
        torch.tensor(colors(read_picture(path))) - torch.tensor([RED, GREEN, BLUE, (128,) * 3])
    ).abs().max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparency_becomes_white(mode):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., :3] = 100
    rgba[..., 3] = [[0, 51, 255], [0, 51, 255]]
    image = Image.fromarray(rgba)
    image = image.convert({"La": "LA", "PA": "P"}.get(mode, mode))
    image = image if image.mode == mode else image.convert(mode)
    picture = as_picture(image, "content") * 255
    assert torch.allclose(picture[:, 0], torch.tensor([255.0, 0.2 * 100 + 0.8 * 255, 100.0]), atol=1.5)


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(corners()).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    transparent = image.getpixel((2, 2))
    for name in ("a.png", "a.gif"):
        picture = read_picture(saved(image, tmp_path / name, transparency=transparent))
        assert colors(picture)[0] == [255, 255, 255] and colors(picture)[1] == list(GREEN)


def test_grey_with_a_transparent_level(tmp_path):
    path = saved(Image.fromarray(corners()[..., 0]), tmp_path / "a.png", transparency=128)
    assert colors(read_picture(path))[2:] == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_of_16_bits(tmp_path, name):
    levels = np.array([[0, 1000, 65535], [256, 32768, 40000]], np.uint16)
    path = saved(Image.fromarray(levels), tmp_path / name)
    assert Image.open(path).mode.startswith("I")
    picture = read_picture(path)
    assert picture.shape == (3, 2, 3)
    assert torch.equal(picture[0], torch.from_numpy(levels.astype(np.float32) / 65535))
    assert torch.equal(picture[0], picture[2])


def png_of_16_bits(path: Path, rgb: tuple[int, int, int]) -> Path:
    """One pixel, written by hand: Pillow writes no RGB of 16 bits."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + struct.pack(">3H", *rgb))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    return path


def test_rgb_of_16_bits(tmp_path):
    picture = read_picture(png_of_16_bits(tmp_path / "a.png", (65535, 32896, 0)))
    assert torch.allclose(picture[:, 0, 0], torch.tensor([1.0, 128 / 255, 0.0]))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, GREEN)]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert colors(read_picture(path))[0] == list(RED)


def test_one_pixel(tmp_path):
    picture = read_picture(saved(Image.new("RGB", (1, 1), BLUE), tmp_path / "a.png"))
    assert picture.shape == (3, 1, 1)
    assert resized(picture, 5, 7).shape == (3, 5, 7)
    assert torch.allclose(resized(picture, 5, 7)[2], torch.ones(5, 7))


# ---- what is refused ---------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        read_picture(path)
    text = str(raised.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_what_is_no_picture(tmp_path):
    path = tmp_path / "a.png"
    assert refusal(path) == "cannot be read: No such file or directory"
    assert refusal(tmp_path) == "cannot be read: Is a directory"
    path.write_bytes(b"")
    assert refusal(path) == "not a picture that Pillow can read"
    path.write_text("a letter")
    assert refusal(path) == "not a picture that Pillow can read"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.webp"])
def test_a_truncated_file(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refusal(path)


def test_broken_data(tmp_path):
    path = saved(Image.fromarray(corners()), tmp_path / "a.png")
    data = bytearray(path.read_bytes())
    at = data.index(b"IDAT")
    data[at + 6 : at + 20] = b"\xff" * 14
    path.write_bytes(data)
    refusal(path)


def test_more_pixels_than_the_limit(tmp_path, monkeypatch, recwarn):
    path = saved(Image.new("L", (30, 20)), tmp_path / "a.png")
    monkeypatch.setattr(pictures, "PIXEL_LIMIT", 599)
    assert refusal(path) == "more than 0 million pixels: 30 x 20"
    monkeypatch.setattr(pictures, "PIXEL_LIMIT", 600)
    assert read_picture(path).shape == (3, 20, 30)


def test_a_header_that_promises_more_than_memory_holds(tmp_path, recwarn):
    """100000 x 100000, in a file of 100 bytes: nothing is decoded, and Pillow says nothing of its own."""
    path = png_of_16_bits(tmp_path / "a.png", RED)
    data = bytearray(path.read_bytes())
    for width, height in ((100_000, 100_000), (10_000, 10_000)):  # beyond Pillow's limits, and beyond ours
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        path.write_bytes(data)
        assert refusal(path).startswith("more than 80 million pixels")
    assert not recwarn.list


def test_numbers_without_a_range(tmp_path):
    path = saved(Image.fromarray(np.ones((2, 2), np.float32)), tmp_path / "a.tif")
    assert refusal(path) == "expected 8 or 16 bits, got floating point, whose range no file says"
    path = saved(Image.fromarray(np.full((2, 2), 70_000, np.int32)), tmp_path / "a.tif")
    assert refusal(path) == "expected grey of at most 16 bits, got 70000 to 70000"


# ---- what is no file ---------------------------------------------------------------------------------------


def test_arrays_and_tensors():
    array = corners()
    expected = to_tensor(array)
    assert torch.equal(as_picture(array, "content"), expected)
    assert torch.equal(as_picture(expected.double().requires_grad_(), "content"), expected)
    assert torch.equal(as_picture(expected[None], "content"), expected)
    grey = as_picture(array[..., 0], "content")
    assert grey.shape == (3, 20, 30) and torch.equal(grey[1], expected[0])
    assert (to_array(expected) == array).all()


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (3, "int 3"),
        (None, "None"),
        (np.zeros((4, 4, 3)), "float64 [4, 4, 3]"),
        (np.zeros((4, 4, 4), np.uint8), "uint8 [4, 4, 4]"),
        (np.zeros((0, 4, 3), np.uint8), "uint8 [0, 4, 3]"),
        (torch.zeros(1, 4, 4), "float32 [1, 4, 4]"),
        (torch.zeros(2, 3, 4, 4), "float32 [2, 3, 4, 4]"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "uint8 [3, 4, 4]"),
    ],
)
def test_what_is_no_picture_in_memory(value, got):
    with pytest.raises(TypeError) as raised:
        as_picture(value, "styles[1]")
    expected = "a path, a PIL image, uint8 [H, W, 3] or a float tensor [3, H, W]"
    assert str(raised.value) == f"stylize: styles[1] must be {expected}, got {got}"


def test_masks(tmp_path):
    white = np.zeros((4, 6), np.uint8)
    white[:, 3:] = 255
    expected = torch.from_numpy(white / 255.0).float()
    rgba = np.full((4, 6, 4), 255, np.uint8)
    rgba[..., 3] = white  # white everywhere, and seen on the right alone
    path = saved(Image.fromarray(white), tmp_path / "mask.png")
    for mask in (path, str(path), Image.fromarray(rgba), white, white > 0, expected.double(), expected > 0):
        assert torch.allclose(as_mask(mask, "content_masks[0]"), expected, atol=1e-6)
    with pytest.raises(
        TypeError, match=r"stylize: style_masks\[2\] must be a path, a PIL image, uint8 or bool"
    ):
        as_mask(torch.zeros(1, 4, 4), "style_masks[2]")


# ---- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "a.tiff"])
def test_writing(tmp_path, name):
    path = tmp_path / name
    check_output(path)
    write_picture(to_tensor(corners()), path)
    assert list(tmp_path.iterdir()) == [path]
    assert (
        torch.tensor(colors(read_picture(path))) - torch.tensor([RED, GREEN, BLUE, (128,) * 3])
    ).abs().max() < 40
    write_picture(torch.tensor([-1.0, 0.5, 2.0])[:, None, None].expand(3, 4, 4), tmp_path / "b.png")
    assert colors(read_picture(tmp_path / "b.png"))[0] == [0, 128, 255]


def test_where_nothing_can_be_written(tmp_path):
    for path, message in (
        (tmp_path / "a.doc", "expected the name of a picture such as out.png or out.jpg"),
        (tmp_path / "a", "expected the name of a picture such as out.png or out.jpg"),
        (tmp_path / "none" / "a.png", f"no folder {tmp_path / 'none'}"),
    ):
        with pytest.raises(ValueError) as raised:
            check_output(path)
        assert str(raised.value) == f"{path}: {message}"


def test_what_breaks_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def broken(file: object) -> None:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == b"old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_beside(path, broken)
    assert os.listdir(tmp_path) == ["a.bin"] and path.read_bytes() == b"old"


def test_who_reads_while_a_file_is_written_has_the_old_one(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_beside(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old" and path.read_bytes() == b"new"


# ---- sizes and luminance -----------------------------------------------------------------------------------


def test_sizes():
    assert fitted(100, 200, 400) == (50, 100)
    assert fitted(100, 400, 200) == (100, 50)
    assert fitted(100, 1, 1) == (100, 100)
    assert fitted(10, 1, 1000) == (1, 10)
    stripes = torch.zeros(3, 64, 64)
    stripes[:, :, ::2] = 1
    small = resized(stripes, 16, 16)
    assert (small[:, :, 2:-2] - 0.5).abs().max() < 0.02  # averaged, not picked
    assert resized(stripes, 64, 64) is stripes
    large = resized(stripes, 100, 90)
    assert large.min() >= 0 and large.max() <= 1


def test_luminance_changes_and_chroma_stays():
    picture = torch.rand(3, 9, 8)
    wish = torch.rand(1, 9, 8) * 1.4 - 0.2
    found = with_luminance(picture, wish)
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6
    torch.testing.assert_close(found - luminance(found), picture - luminance(picture), rtol=0, atol=1e-6)
    reached = (luminance(found) - wish).abs() < 1e-6
    edge = (found.amin(dim=0) < 1e-6) | (found.amax(dim=0) > 1 - 1e-6)
    assert (reached | edge).all() and reached.any()
    torch.testing.assert_close(with_luminance(picture, luminance(picture)), picture, rtol=0, atol=1e-6)


def test_matched_luminance():
    style, content = torch.rand(3, 9, 8), 0.2 * torch.rand(3, 5, 4) + 0.3
    found, expected = matched_luminance(style, content), luminance(content)
    torch.testing.assert_close(found.mean(), expected.mean())
    torch.testing.assert_close(found.std(correction=0), expected.std(correction=0))
    even = matched_luminance(torch.full((3, 4, 4), 0.7), content)
    torch.testing.assert_close(even, expected.mean().expand(1, 4, 4))
