"""What the examples of recognition share: scores on identities that were never seen, and runs over seeds."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from .._command_line import ends_quietly
from ..nearest_neighbors import nearest_neighbors
from ..verification import pair_distances


class Scores(NamedTuple):
    one_shot: float  # accuracy of K-way one-shot identification; chance is 1 / K
    auc: float  # area under the ROC curve of "are these two the same?"; chance is 0.5


def score(embeddings: Tensor, labels: Tensor) -> Scores:
    """How well embeddings [N, D] tell apart the K identities of labels, int64 [N]."""
    return Scores(one_shot_accuracy(embeddings, labels), verification_auc(embeddings, labels))


def one_shot_accuracy(embeddings: Tensor, labels: Tensor, episodes: int = 100) -> float:
    """Who is this? In every episode, one embedding of each identity is the gallery and all others ask.

    Source: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program
    induction" (2015), one-shot classification. Identities count alike, however many embeddings each has.
    """
    from sklearn.metrics import balanced_accuracy_score

    generator = torch.Generator().manual_seed(0)
    rows = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    accuracies = []
    for _ in range(episodes):
        gallery = torch.stack([mine[torch.randint(len(mine), (), generator=generator)] for mine in rows])
        asks = torch.ones(len(labels), dtype=torch.bool)
        asks[gallery] = False
        nearest = nearest_neighbors(embeddings[asks], embeddings[gallery], 1).indices[:, 0]
        accuracies.append(balanced_accuracy_score(labels[asks], labels[gallery][nearest]))
    return mean(accuracies)


def verification_auc(embeddings: Tensor, labels: Tensor, pairs: int = 20_000) -> float:
    """Are these two the same? Asked of random pairs."""
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(labels), (pairs, 2), generator=generator)
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    same = labels[drawn[:, 0]] == labels[drawn[:, 1]]
    return float(roc_auc_score(same, -pair_distances(embeddings, drawn)))


@ends_quietly
def main(
    name: str,
    description: str,
    run: Callable[[int], dict[str, NamedTuple]],
    argv: Sequence[str] | None = None,
) -> int:
    """The command of an example: runs it with some seeds and prints the mean and spread of every score.

    Args:
        name: of the module.
        description: one line for --help.
        run: from a seed to scores by the name of what was scored; ImportError for what is missing.
        argv: the arguments, in place of the command line's.

    Returns:
        Exit code 0, or 1 for a missing package.
    """
    parser = argparse.ArgumentParser(prog=f"python -m deepsim_ext.examples.{name}", description=description)
    parser.add_argument("--seeds", type=int, default=5, help="how many runs (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    if importlib.util.find_spec("sklearn") is None:
        print(f'{name}: scikit-learn not installed; pip install "deepsim-ext[eval]"', file=sys.stderr)
        return 1
    try:
        runs = [run(seed) for seed in range(args.seeds)]
    except ImportError as problem:
        print(f"{name}: {problem}", file=sys.stderr)
        return 1
    fields = next(iter(runs[0].values()))._fields
    print(f"{'':28}" + "".join(f"{field.replace('_', ' '):>16}" for field in fields))
    for scored in runs[0]:
        columns = zip(*(scores[scored] for scores in runs), strict=True)
        print(f"{scored:28}" + "".join(f"{_mean_and_spread(column):>16}" for column in columns))
    return 0


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
