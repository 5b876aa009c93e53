"""The example of fast style transfer: it learns, compiles once, under autocast, and the command's files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from deepsim_ext import StyleTransferResult
from deepsim_ext.examples import fast_style
from deepsim_ext.examples.fast_style import PACKAGES, Stylizer, load, main, save, squares, stylized, train

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in PACKAGES), reason="needs the extra stylize"
)
# Random filters on the smallest squares: a step takes some hundredths of a second.
QUICK = {"batch": 2, "size": 16, "weights": "random", "backend": None}


def picture(height: int, width: int, seed: int) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


PHOTOS, STYLE = [picture(20, 24, 1), picture(30, 16, 2)], picture(24, 24, 3)


def trained(**options: object) -> tuple[Stylizer, list[StyleTransferResult]]:
    results: list[StyleTransferResult] = []
    stylizer = train(PHOTOS, STYLE, callback=results.append, **(QUICK | options))
    return stylizer, results


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (25, 19)])
def test_the_network_keeps_sizes_and_the_range_of_pictures(size):
    pictures = torch.rand(2, 3, *size)
    result = Stylizer(width=2, blocks=1)(pictures)
    assert result.shape == pictures.shape
    assert result.min() >= 0 and result.max() <= 1


def test_it_learns_and_the_same_seed_learns_the_same():
    (stylizer, results), (again, _) = trained(steps=25), trained(steps=25)
    assert sum(r.loss for r in results[-5:]) < 0.7 * sum(r.loss for r in results[:5])
    assert all(torch.equal(a, b) for a, b in zip(stylizer.parameters(), again.parameters(), strict=True))
    assert not results[0].loss.requires_grad


def test_one_graph_for_all_steps_under_autocast_in_bfloat16():
    """Though the content is set anew for every batch."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    _, compiled = trained(steps=2, batch=1, precision="bfloat16", backend=graphs)
    assert graphs.frame_count == 1
    _, single = trained(steps=1, batch=1, precision="float32")
    assert compiled[0].loss.dtype == torch.float32
    for half, exact in zip(compiled[0], single[0], strict=True):
        torch.testing.assert_close(half, exact, rtol=0.05, atol=0)
    assert all(result.loss.isfinite() for result in compiled)


def test_squares_are_as_large_as_the_photo_allows():
    wide = torch.linspace(0, 1, 12)[None, None].expand(3, 4, 12)  # each column of one grey
    for square in squares([wide], 20, 4, torch.Generator().manual_seed(0)):
        left = round(square[0, 0, 0].item() * 11)
        assert torch.equal(square, wide[:, :, left : left + 4])


def test_saved_and_loaded(tmp_path):
    stylizer = Stylizer(width=3, blocks=2)
    save(stylizer, tmp_path / "s.pt")
    assert torch.equal(stylized(load(tmp_path / "s.pt"), PHOTOS[0]), stylized(stylizer, PHOTOS[0]))


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """photos/ with two pictures, a small one and a text; style.png."""
    from deepsim_ext.stylize.pictures import write_picture

    (tmp_path / "photos").mkdir()
    for name, photo in (("a", PHOTOS[0]), ("b", PHOTOS[1]), ("small", picture(8, 40, 4))):
        write_picture(photo, tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    write_picture(STYLE, tmp_path / "style.png")
    return tmp_path


def command(folder: Path, *arguments: str) -> int:
    quick = ["--steps", "2", "--size", "16", "--batch", "1", "--weights", "random", "--no-compile"]
    return main(
        [str(folder / "photos"), str(folder / "style.png"), "-o", str(folder / "out"), *quick, *arguments]
    )


def test_the_command_writes_network_and_pictures(folder, capsys):
    from deepsim_ext.stylize.pictures import read_picture

    assert command(folder, "--tv-weight", "1", "--style-size", "20") == 0
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert names == ["a.png", "b.png", "stylizer.pt"]
    left_out = capsys.readouterr().err
    assert "notes.txt: not a picture" in left_out and "small.png: smaller than 16 x 16" in left_out
    photos = fast_style.read_photos(folder / "photos", 16)
    assert {name: tuple(p.shape) for name, p in photos.items()} == {"a": (3, 16, 19), "b": (3, 30, 16)}
    again = stylized(load(folder / "out" / "stylizer.pt"), photos["a"])
    assert (again - read_picture(folder / "out" / "a.png")).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--photos-gone"], "no such folder"),
        (["--empty"], "no picture in it"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--style-weight", "-1"], "style_weight must be a finite number >= 0"),
    ],
)
def test_unusable_input_is_one_line(folder, arguments, said, capsys):
    if "gone" in arguments[0]:
        (folder / "photos").rename(folder / "elsewhere")
        arguments = []
    elif "empty" in arguments[0]:
        for path in (folder / "photos").glob("[ab].png"):
            path.unlink()
        arguments = []
    assert command(folder, *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fast_style: ") and said in last


@pytest.mark.parametrize("option", ["steps", "batch", "size", "style-size"])
def test_numbers_that_are_too_small(folder, option, capsys):
    with pytest.raises(SystemExit):
        command(folder, f"--{option}", "0")
    assert f"--{option} must be at least" in capsys.readouterr().err


def test_missing_packages_are_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(PACKAGES, "no_such_module", "no-such-package")
    assert command(folder) == 1
    assert 'no-such-package not installed; pip install "deepsim-ext[stylize]"' in capsys.readouterr().err
