"""Fast style transfer: a small network that learns one style, and then stylises a picture in a single pass.

    python -m deepsim_ext.examples.fast_style photos/ style.jpg -o stylised/ --steps 500

trains on the pictures of a folder with `StyleTransferLoss`, under torch.compile and, where the device has
instructions for bfloat16, autocast. It writes the network, `stylizer.pt`, and what it makes of the first
photos; `load` and `stylized` use it again. Needs the extra `deepsim-ext[stylize]`.

Source: Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution" (2016),
smaller, with the instance normalisation of Ulyanov, Vedaldi, Lempitsky (2016), nearest-neighbour upsampling,
and the picture itself added to what comes out.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .._command_line import ends_quietly
from .._files import write_beside
from ..nn import StyleTransferLoss
from ..presets import style_preset
from ..results import StyleTransferResult
from ..stylize.pictures import read_picture, resized, write_picture
from ..vgg import VGG19Features

# import name -> name on PyPI
PACKAGES = {"PIL": "pillow", "tqdm": "tqdm"}
PRESET = style_preset("pytorch_examples")
PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LEAST_SIDE = 16  # of photos: of which VGG's fourth block and the stylizer's inner layers leave some positions
SHOWN = 4  # photos that are stylised after training


def _convolution(channels: int, width: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, size, stride, padding=size // 2, padding_mode="reflect"),
        nn.InstanceNorm2d(width, affine=True),
    )


class Stylizer(nn.Module):
    """Down to a quarter of the size, residual blocks, and up again.

    Args:
        width: channels of the first layer; the residual blocks have four times as many.
        blocks: residual blocks.
    """

    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.first = _convolution(3, width, 9)
        self.down = nn.ModuleList(_convolution(w, 2 * w, stride=2) for w in (width, 2 * width))
        self.blocks = nn.ModuleList(
            nn.Sequential(_convolution(4 * width, 4 * width), nn.ReLU(), _convolution(4 * width, 4 * width))
            for _ in range(blocks)
        )
        self.up = nn.ModuleList(_convolution(w, w // 2) for w in (4 * width, 2 * width))
        self.last = nn.Conv2d(width, 3, 9, padding=4, padding_mode="reflect")
        self.options = {"width": width, "blocks": blocks}

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] to the same."""
        x, sizes = self.first(pictures - 0.5).relu(), []
        for layer in self.down:
            sizes.append(x.shape[2:])
            x = layer(x).relu()
        for block in self.blocks:
            x = x + block(x)
        for layer, size in zip(self.up, reversed(sizes), strict=True):
            x = layer(nn.functional.interpolate(x, size)).relu()
        # Training starts from a pale copy, not from grey; the weak slope leaves every colour within reach.
        return (self.last(x) + 2 * (pictures - 0.5)).sigmoid()


def train(
    photos: Sequence[Tensor],
    style: Tensor,
    *,
    steps: int = 500,
    batch: int = 4,
    size: int = 128,
    learning_rate: float = 2e-3,
    precision: str | None = None,
    backend: str | None = "inductor",
    weights: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    callback: Callable[[StyleTransferResult], object] | None = None,
    **loss_options: float,
) -> Stylizer:
    """A network that gives photos a style.

    Args:
        photos: [3, H, W] in [0, 1], of any sizes; random squares of `size` are cut out of them.
        style: [3, H, W] in [0, 1].
        steps, batch, learning_rate: of Adam.
        precision: "bfloat16" for autocast, or "float32"; None: whichever suits the device.
        backend: of torch.compile; None runs eagerly.
        weights: as in `VGG19Features`.
        seed: of the network's first weights and of the squares.
        device: where to train, and where the network stays.
        callback: called after every step with the loss and its terms.
        loss_options: style_weight, content_weight and tv_weight, in place of the preset's.
    """
    precision = precision or ("bfloat16" if has_bfloat16(torch.device(device)) else "float32")
    dtype = PRECISIONS[precision]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stylizer = Stylizer().to(device)
    # VGG16 in the source; these layers of VGG19 have the same widths and depths, but for one in block 4.
    vgg = {"weights": weights, "scale": PRESET.scale, "seed": seed}
    layers = dict.fromkeys(PRESET.style_layers + PRESET.content_layers)
    network = VGG19Features(list(layers), **vgg).to(device)
    content_network = VGG19Features(list(PRESET.content_layers), **vgg).to(device)
    criterion = StyleTransferLoss.from_preset(PRESET, **loss_options)
    criterion.set_style(network(style[None].to(device)))

    def loss_of(pictures: Tensor) -> StyleTransferResult:
        images = stylizer(pictures)
        return criterion(network(images), images, return_terms=True)

    if backend is not None:
        loss_of = torch.compile(loss_of, fullgraph=True, backend=backend)
    optimizer = torch.optim.Adam(stylizer.parameters(), learning_rate)
    for _ in range(steps):
        pictures = squares(photos, batch, size, generator).to(device)
        with torch.autocast(pictures.device.type, dtype, enabled=dtype is not torch.float32):
            with torch.no_grad():
                criterion.set_content(content_network(pictures))
            result = loss_of(pictures)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        if callback is not None:
            callback(StyleTransferResult(*(term.detach() for term in result)))
    return stylizer


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; a CPU without takes many times as long as in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def squares(photos: Sequence[Tensor], count: int, size: int, generator: torch.Generator) -> Tensor:
    """[count, 3, size, size]: random squares of random photos, as large as the photo allows."""
    pictures = []
    for i in torch.randint(len(photos), (count,), generator=generator).tolist():
        photo = photos[i]
        side = min(photo.shape[1:])
        top, left = (torch.randint(n - side + 1, (1,), generator=generator).item() for n in photo.shape[1:])
        pictures.append(resized(photo[:, top : top + side, left : left + side], size, size))
    return torch.stack(pictures)


@torch.no_grad()
def stylized(stylizer: Stylizer, picture: Tensor) -> Tensor:
    """The picture [3, H, W], H and W at least 16, in the style that was learnt, float32 on the CPU."""
    device = next(stylizer.parameters()).device
    return stylizer(picture[None].to(device))[0].float().cpu()


def save(stylizer: Stylizer, path: Path) -> None:
    """Writes options and weights."""
    state = {"options": stylizer.options, "weights": stylizer.state_dict()}
    write_beside(path, lambda file: torch.save(state, file))


def load(path: str | Path) -> Stylizer:
    """What `save` wrote."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    stylizer = Stylizer(**state["options"])
    stylizer.load_state_dict(state["weights"])
    return stylizer


# ---- the command -------------------------------------------------------------------------------------------


def read_photos(folder: Path, size: int) -> dict[str, Tensor]:
    """The pictures of a folder by name, their shorter side at most `size`. What is none is named, no more.

    Raises:
        ValueError: there is no picture, or one that is too small.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    photos = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            photo = read_picture(path)
        except ValueError as problem:
            print(f"left out: {problem}", file=sys.stderr)
            continue
        shorter = min(photo.shape[1:])
        if shorter < LEAST_SIDE:
            print(f"left out: {path}: smaller than {LEAST_SIDE} x {LEAST_SIDE}", file=sys.stderr)
            continue
        scale = min(1.0, size / shorter)
        photos[path.stem] = resized(photo, *(round(n * scale) for n in photo.shape[1:]))
    if not photos:
        raise ValueError(f"{folder}: no picture in it")
    return photos


@ends_quietly
def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and writes to a folder; exit code 0, 1 for a missing package, 2 for unusable input."""
    parser = argparse.ArgumentParser(
        prog="python -m deepsim_ext.examples.fast_style",
        description="Train a small network that stylises pictures in a single pass.",
    )
    parser.add_argument("photos", type=Path, help="folder of pictures to train on")
    parser.add_argument("style", type=Path, help="picture whose style to learn")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder, made if need be")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=128, help="side of the squares (default: %(default)s)")
    parser.add_argument("--style-size", type=int, default=256, help="longer side of the style picture")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    for term in ("content", "style", "tv"):
        default = getattr(PRESET, f"{term}_weight")
        parser.add_argument(f"--{term}-weight", type=float, default=default, help="default: %(default)g")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: what suits the device")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--weights", help='a state_dict of torchvision\'s vgg19, or "random"')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f'fast_style: {", ".join(missing)} not installed; pip install "deepsim-ext[stylize]"',
            file=sys.stderr,
        )
        return 1
    for name, least in (("steps", 1), ("batch", 1), ("size", LEAST_SIDE), ("style_size", LEAST_SIDE)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    try:
        _run(args)
    except (TypeError, ValueError, OSError) as problem:
        print(f"fast_style: {problem}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    photos = read_photos(args.photos, args.size)
    style = read_picture(args.style)
    scale = args.style_size / max(style.shape[1:])
    style = resized(style, *(max(LEAST_SIDE, round(n * scale)) for n in style.shape[1:]))
    args.output.mkdir(parents=True, exist_ok=True)
    with tqdm(total=args.steps, desc="fast style", unit="step") as progress:

        def show(result: StyleTransferResult) -> None:
            progress.update()
            progress.set_postfix({name: f"{term:.3g}" for name, term in result._asdict().items()})

        stylizer = train(
            list(photos.values()),
            style,
            steps=args.steps,
            batch=args.batch,
            size=args.size,
            learning_rate=args.learning_rate,
            precision=args.precision,
            backend=None if args.no_compile else "inductor",
            weights=args.weights,
            seed=args.seed,
            device=args.device,
            callback=show,
            style_weight=args.style_weight,
            content_weight=args.content_weight,
            tv_weight=args.tv_weight,
        )
    save(stylizer, args.output / "stylizer.pt")
    for name, photo in list(photos.items())[:SHOWN]:
        write_picture(stylized(stylizer, photo), args.output / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
