"""`python -m benchmarks.hardness`: losses, gradients and choices on embeddings that are hard to compute with.

All are compared with float64 by direct differences of the same rounded embeddings (`deepsim_ext.reference`).
pytorch-metric-learning and sentence-transformers get these as well, not normalised, and are set to the same
loss where they have it; both are needed, and faiss. Writes results/hardness.json and hardness.md, from which
`python -m benchmarks.readme` takes a summary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Identity

from deepsim_ext import functional, reference
from tests.samples import balanced_labels

from .environment import environment
from .report import table
from .timing import Contender, Inputs, Record, relative_errors, value_and_gradients

RESULT = Path(__file__).parent / "results" / "hardness.json"
N, D, K, NEIGHBORS = 192, 64, 4, 5
# What is promised of choices in float32: squared distances within this share of the largest squared distance
# of a row from the mean. Rows that are nearer to each other than that may be taken for one another.
CONTRACT = 1e-5
OURS, LEARNING, TRANSFORMERS = "deepsim_ext", "pytorch-metric-learning", "sentence-transformers"
LIBRARIES = (OURS, LEARNING, TRANSFORMERS)

Loss = Callable[[Tensor, Tensor], Tensor]


class Case(NamedTuple):
    embeddings: Tensor  # [N, D], in the dtype that every library gets
    labels: Tensor  # int64 [N]
    margin: float  # of triplets; of a size with the distances inside a class
    neg_margin: float  # of pairs; of a size with the distances between classes


def cases() -> dict[str, Case]:
    g = torch.Generator().manual_seed(0)
    labels = balanced_labels(N, K, g)
    # Rows of one class are some 11 apart, rows of two classes some 16.
    points = torch.randn(N // K, D, generator=g)[labels] + torch.randn(N, D, generator=g)
    # Of every row there are four copies, two of them in one class.
    row = torch.arange(N)
    copies, labels_of_copies = points[row % (N // 4)], row % (3 * N // 16)
    # All margins are exact in float32.
    return {
        "small clusters around 100": Case(100 + points / 32, labels, 0.125, 0.5),
        "duplicates": Case(copies, labels_of_copies, 4.0, 16.0),
        "one class 1e4 away": Case(points + 1e4 * (labels == 0)[:, None], labels, 4.0, 16.0),
        "half of the classes 1e4 away": Case(points + 1e4 * (labels % 2)[:, None], labels, 4.0, 16.0),
        "float16 near 6e4": Case((6e4 + 512 * points).half(), labels, 2048.0, 8192.0),
        "bfloat16": Case(points.bfloat16(), labels, 4.0, 16.0),
    }


# ---- losses ------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[str, dict[str, str]]] = {
    "batch-hard": ("batch_hard_triplet_loss", {}),
    "semi-hard, FaceNet": ("batch_semi_hard_triplet_loss", {}),
    "semi-hard, all inside the margin": ("batch_semi_hard_triplet_loss", {"definition": "pml"}),
    "batch-all": ("batch_all_triplet_loss", {}),
    "contrastive": ("batch_contrastive_loss", {}),
}


def ours(module: Any, case: Case) -> dict[str, Loss]:
    """`LOSSES` of `functional` or of `reference`."""

    def margin(loss: str) -> dict[str, float]:
        return {"neg_margin": case.neg_margin} if loss == "contrastive" else {"margin": case.margin}

    return {
        loss: partial(getattr(module, function), **options, **margin(loss))
        for loss, (function, options) in LOSSES.items()
    }


def metric_learning(case: Case) -> dict[str, Loss]:
    from pytorch_metric_learning import distances, losses, miners, reducers

    distance = distances.LpDistance(normalize_embeddings=False)
    mean = losses.TripletMarginLoss(case.margin, distance=distance, reducer=reducers.MeanReducer())
    hard = miners.BatchHardMiner(distance=distance)
    window = miners.TripletMarginMiner(case.margin, "semihard", distance=distance)
    return {
        "batch-hard": lambda x, labels: mean(x, labels, hard(x, labels)),
        "semi-hard, all inside the margin": lambda x, labels: mean(x, labels, window(x, labels)),
        "batch-all": losses.TripletMarginLoss(case.margin, distance=distance),
        "contrastive": losses.ContrastiveLoss(0, case.neg_margin, distance=distance),
    }


def sentence_transformers(case: Case) -> dict[str, Loss]:
    from sentence_transformers.sentence_transformer import losses

    def loss(kind: str) -> Loss:
        module = getattr(losses, kind)(Identity(), margin=case.margin)
        return lambda x, labels: module.compute_loss_from_embeddings([x], labels)

    return {
        "batch-hard": loss("BatchHardTripletLoss"),
        "semi-hard, FaceNet": loss("BatchSemiHardTripletLoss"),
        "batch-all": loss("BatchAllTripletLoss"),
    }


def loss_records(case: Case) -> list[Record]:
    """Relative errors of every loss and its gradient (in the Euclidean norm)."""

    def outcome(loss: Loss, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        contender = Contender("", lambda leaves, constants: loss(leaves[0], constants[0]))
        return value_and_gradients(contender, Inputs([x], [case.labels]))

    libraries = {
        OURS: ours(functional, case),
        LEARNING: metric_learning(case),
        TRANSFORMERS: sentence_transformers(case),
    }
    records = []
    for name, loss in ours(reference, case).items():
        exact = outcome(loss, case.embeddings.double())
        for library, losses in libraries.items():
            if name in losses:
                value, gradient = relative_errors(outcome(losses[name], case.embeddings), exact)
                record = {"what": name, "library": library, "error": value, "gradient_error": gradient}
                records.append(record)
    return records


# ---- choices -----------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    indices: Tensor  # int64 [N, C], the rows that were chosen; -1 for none
    allowed: Tensor  # bool [N, N], the rows that there were to choose from
    best: Tensor  # [N, C], the squared distances of the right choice


def choice_record(squared: Tensor, case: Case, choices: list[Choice]) -> Record:
    """Counts of all choices, of those that are not the best, and of those that are wrong by `CONTRACT`."""
    x = case.embeddings.double()
    gap = CONTRACT * (x - x.mean(0)).square().sum(1).max()
    off = []
    for indices, allowed, best in choices:
        valid = (indices >= 0) & allowed.gather(1, indices.clamp(min=0))
        distances = squared.gather(1, indices.clamp(min=0)).masked_fill(~valid, torch.inf)
        off.append((distances - best).abs().flatten())
    off = torch.cat(off)
    return {"choices": len(off), "not_best": int((off > 0).sum()), "wrong": int((off > gap).sum())}


def mining_records(case: Case, squared: Tensor) -> list[Record]:
    """The hardest positive and negative of every row."""
    from pytorch_metric_learning import distances, miners

    same = case.labels[:, None] == case.labels
    positive, negative = same & ~torch.eye(N, dtype=torch.bool), ~same
    farthest = squared.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    nearest = squared.masked_fill(~negative, torch.inf).amin(1, keepdim=True)
    mine = {
        OURS: functional.batch_hard_mine,
        LEARNING: miners.BatchHardMiner(distance=distances.LpDistance(normalize_embeddings=False)),
    }
    records = []
    for library, miner in mine.items():
        anchors, *chosen = miner(case.embeddings, case.labels)
        p, n = (torch.full((N,), -1).index_copy(0, anchors, indices)[:, None] for indices in chosen)
        found = choice_record(squared, case, [Choice(p, positive, farthest), Choice(n, negative, nearest)])
        records.append({"what": "hardest positives and negatives", "library": library} | found)
    return records


def neighbor_records(case: Case, squared: Tensor) -> list[Record]:
    """The nearest other rows of every row, and the error of their distances (in the Euclidean norm)."""
    from pytorch_metric_learning.utils.inference import FaissKNN
    from sentence_transformers import util

    others = ~torch.eye(N, dtype=torch.bool)
    best = squared.masked_fill(~others, torch.inf).sort(1).values[:, :NEIGHBORS]

    def faiss(x: Tensor) -> tuple[Tensor, Tensor]:
        distances, indices = FaissKNN()(x, NEIGHBORS, x, ref_includes_query=True)
        return distances.sqrt(), indices

    def search(x: Tensor) -> tuple[Tensor, Tensor]:
        hits = util.semantic_search(x, x, top_k=NEIGHBORS + 1, score_function=util.euclidean_sim)
        kept = [[hit for hit in row if hit["corpus_id"] != i][:NEIGHBORS] for i, row in enumerate(hits)]
        return (
            torch.tensor([[-hit["score"] for hit in row] for row in kept]),
            torch.tensor([[hit["corpus_id"] for hit in row] for row in kept]),
        )

    find = {
        OURS: lambda x: functional.nearest_neighbors(x, None, NEIGHBORS),
        LEARNING: faiss,
        TRANSFORMERS: search,
    }
    records = []
    for library, neighbors in find.items():
        distances, indices = neighbors(case.embeddings)
        error = (distances.double() - best.sqrt()).norm() / best.sqrt().norm()
        record = {"what": f"{NEIGHBORS} nearest neighbours", "library": library, "error": error.item()}
        records.append(record | choice_record(squared, case, [Choice(indices, others, best)]))
    return records


# ---- report ------------------------------------------------------------------------------------------------


def measure(case: Case) -> list[Record]:
    x = case.embeddings.double()
    squared = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    return [*loss_records(case), *mining_records(case, squared), *neighbor_records(case, squared)]


def as_text(error: float) -> str:
    return f"{error:.0e}" if math.isfinite(error) else str(error)


def markdown(result: Record) -> str:
    header = ["case", "", "library", "error", "gradient's error", "choices", "not the best", "wrong"]
    rows = [
        [
            *(r[key] for key in ("case", "what", "library")),
            *(as_text(float(r[key])) if key in r else "–" for key in ("error", "gradient_error")),
            *(str(r.get(key, "–")) for key in ("choices", "not_best", "wrong")),
        ]
        for r in result["records"]
    ]
    parts = [
        "# Hard inputs\n",
        "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in result["environment"].items())
        + "\n",
        f"{N} embeddings of dimension {D}, drawn in `benchmarks/hardness.py`. Errors are relative to float64"
        " by direct differences of the same rounded embeddings: of the loss, or of the distances to the"
        " neighbours, and of the gradient, both in the Euclidean norm. *Not the best* are choices at another"
        " distance than the right one, *wrong* those whose squared distance is off by more than is promised,"
        f" {CONTRACT:g} of the largest squared distance of a row from the mean.\n",
        table(header, rows),
    ]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hardness", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULT.parent, help="folder")
    output = parser.parse_args(arguments).output
    records = [{"case": name} | record for name, case in cases().items() for record in measure(case)]
    for record in records:  # JSON has no NaN and no infinity
        record.update({k: str(v) for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)})
    result = {"environment": environment(), "records": records}
    (output / RESULT.name).write_text(json.dumps(result, indent=1) + "\n")
    (output / RESULT.with_suffix(".md").name).write_text(markdown(result))


if __name__ == "__main__":
    main()
