"""The LFW protocol on 6,000 pairs of embeddings: distances, 10-fold accuracy, validation rate at FAR 1e-3.

Against the loop over folds and thresholds in which the evaluations of FaceNet and ArcFace compute it, which
compares every pair with every threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from deepsim_ext.verification import kfold_accuracy, pair_distances, val_at_far

from .report import Bar
from .timing import Contender, Inputs, Record, run_once, summary

NAME = "verification"
PAIRS, D, FOLDS, FAR = 6000, 512, 10, 1e-3
QUICK_PAIRS = 600
LIMIT_MS = 200
LOOP = "loop over thresholds"
MIN_RUNS = {"deepsim_ext": 25, LOOP: 3}


def case_name(pairs: int) -> str:
    return f"LFW protocol P={pairs} D={D}"


def draw(pairs: int) -> Inputs:
    """Rows 2i and 2i + 1, unit vectors, are pair i; same and different ones take turns."""
    first = torch.randn(pairs, D)
    same = torch.arange(pairs) % 2 == 0
    second = torch.where(same[:, None], first, 0) + 1.2 * torch.randn(pairs, D)
    rows = torch.stack([first, second], dim=1).reshape(2 * pairs, D)
    return Inputs([torch.nn.functional.normalize(rows)], [same])


def counted(rows: Tensor, same: Tensor) -> tuple[float, float, float]:
    """Mean accuracy, validation rate and the false accept rate reached."""
    distances = pair_distances(rows, torch.arange(len(rows)).view(-1, 2))
    accuracy = kfold_accuracy(distances, same, folds=FOLDS).mean
    validation = val_at_far(distances, same, far=FAR, folds=FOLDS)
    return accuracy, validation.mean, validation.far


def looped(rows: Tensor, same: Tensor) -> tuple[float, float, float]:
    """The same, one comparison of all pairs of a fold for each threshold."""
    x, y = rows.numpy(), same.numpy()
    d = np.square(x[0::2] - x[1::2]).sum(axis=1)
    results = []
    for test in np.array_split(np.arange(len(d)), FOLDS):
        train = np.setdiff1d(np.arange(len(d)), test)
        grid = np.arange(0, 4, 0.01)
        threshold = grid[np.argmax([((d[train] < t) == y[train]).mean() for t in grid])]
        accuracy = ((d[test] < threshold) == y[test]).mean()
        grid = np.arange(0, 4, 0.001)
        fars = [(d[train] < t)[~y[train]].mean() for t in grid]
        accepted = d[test] < (np.interp(FAR, fars, grid) if max(fars) >= FAR else 0)
        results.append((accuracy, accepted[y[test]].mean(), accepted[~y[test]].mean()))
    return tuple(float(value) for value in np.mean(results, axis=0))


def time_case(pairs: int, seconds: float) -> list[Record]:
    torch.manual_seed(0)
    ways = {"deepsim_ext": counted, LOOP: looped}
    inputs = draw(pairs)
    results = {name: way(inputs.leaves[0], inputs.constants[0]) for name, way in ways.items()}
    valid = bool(np.allclose(results["deepsim_ext"], results[LOOP], rtol=0, atol=1e-12))
    times: dict[str, list[float]] = {name: [] for name in ways}
    while sum(times["deepsim_ext"]) < seconds or len(times["deepsim_ext"]) < MIN_RUNS["deepsim_ext"]:
        inputs = draw(pairs)
        for name, way in ways.items():
            if name == LOOP and len(times[LOOP]) >= MIN_RUNS[LOOP]:
                continue
            step = Contender(
                name, lambda xs, constants, way=way: way(xs[0], *constants), differentiable=False
            )
            times[name].append(run_once(step, inputs)["forward"])
    records = [{"contender": name, "phase": "forward"} | summary(t) for name, t in times.items()]
    records[0]["valid"] = valid
    return [{"op": NAME, "kind": "time", "case": case_name(pairs)} | record for record in records]


def jobs(quick: bool) -> list[tuple[str, Callable[[], list[Record]]]]:
    """What there is to measure, each with its name."""
    pairs = QUICK_PAIRS if quick else PAIRS
    return [(case_name(pairs), partial(time_case, pairs, 0.1 if quick else 1.0))]


def bars(records: list[Record]) -> list[Bar]:
    """What the project promises, with the measured figures."""
    times = {r["contender"]: r["p50_ms"] for r in records if r.get("valid", True)}
    ours, loop = (times.get(name) for name in ("deepsim_ext", LOOP))
    case = case_name(PAIRS)
    speedup = None if None in (ours, loop) else loop / ours
    return [
        Bar(f"{case}, ms", ours, at_most=LIMIT_MS),
        Bar(f"{case}, speed-up over the {LOOP}", speedup, at_least=20),
    ]
