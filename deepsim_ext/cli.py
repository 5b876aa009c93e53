"""The command line: `python -m deepsim_ext` and the name of a command."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

from . import __version__, build_info, demo, profile_mining, recognition, stylize
from ._command_line import ends_quietly
from .verification import command as verify


@ends_quietly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m deepsim_ext", description="Deep similarity, fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, CPU kernels in use, CUDA kernels built in")
    info.set_defaults(run=print_info)
    demo_command = commands.add_parser(
        "demo", help="train an embedding and stylise a picture, fast and in plain torch"
    )
    demo.add_arguments(demo_command)
    demo_command.set_defaults(run=demo.run)
    stylize_command = commands.add_parser(
        "stylize", help="a picture in the style of others, or a texture, by VGG19"
    )
    stylize.add_arguments(stylize_command)
    stylize_command.set_defaults(run=stylize.run)
    verify_command = commands.add_parser(
        "verify", help="are these two the same: accuracy, error rates and ROC curve of embeddings"
    )
    verify.add_arguments(verify_command)
    verify_command.set_defaults(run=verify.run)
    profile_command = commands.add_parser(
        "profile-mining", help="throughput of triplet mining on this machine, stage by stage"
    )
    profile_mining.add_arguments(profile_command)
    profile_command.set_defaults(run=profile_mining.run)
    enroll_command = commands.add_parser(
        "enroll", help="add identities to a gallery of embeddings, or remove"
    )
    recognition.add_enroll_arguments(enroll_command)
    enroll_command.set_defaults(run=recognition.run_enroll)
    identify_command = commands.add_parser("identify", help="whose embeddings are these, by a gallery?")
    recognition.add_identify_arguments(identify_command)
    identify_command.set_defaults(run=recognition.run_identify)
    arguments = parser.parse_args(argv)
    try:
        build_info()
    except ValueError as problem:  # of DEEPSIM_CPU_CAPABILITY
        print(f"deepsim_ext: {problem}", file=sys.stderr)
        return 2
    return arguments.run(arguments)


def print_info(arguments: argparse.Namespace) -> int:
    """Prints what a bug report needs to say."""
    build = build_info()
    rows = {
        "deepsim_ext": __version__,
        "torch": torch.__version__,
        "built against torch": build["torch_version"],
        "compiler": build["compiler"],
        "python": f"{platform.python_version()} on {platform.platform()}",
        "CPU kernels": f"{build['cpu_capability']}, {torch.get_num_threads()} threads",
        "CUDA kernels": build["cuda_architectures"] or "not built",
        "CUDA in torch": f"{torch.version.cuda or 'no'}, {torch.cuda.device_count()} devices",
    }
    for name, value in rows.items():
        print(f"{name + ':':<22}{value}")
    return 0
