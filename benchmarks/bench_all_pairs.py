"""Losses over all triplets or pairs of a batch, and nearest neighbours: N normal embeddings of dimension D in
classes of K, in random order.

Margins are such that about half of the pairs matter, as at the start of training. The yardstick is one
`torch.mm(X, X.T)`; the pairs' distances are half of its arithmetic, the gradient of all pairs as much again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import deepsim_ext
from tests.samples import balanced_labels

from .memory import memory_record
from .report import Bar
from .timing import (
    PRODUCT,
    Contender,
    Inputs,
    Record,
    add_rates,
    does_not_fit,
    fresh_leaves,
    measure,
    product,
    product_contender,
    run_once,
    summary,
)

NAME = "all_pairs"
D, K, MARGIN, NEG_MARGIN = 128, 8, 0.2, 16.0
SIZES, QUICK_SIZES = (1024, 4096), (256,)
NEIGHBORS = (8192, 10)
# What forward + backward may take at N = 4096, in products, and its memory beyond (K + 64) 8 N bytes.
RATIO_LIMITS = {"semi_hard": 1.0, "batch_all": 1.8, "contrastive": 1.3}
MEMORY_LIMIT = 64 * 2**20
# At N = 1024, against what lists triplets.
LISTED_LIMIT = 50
NEIGHBORS_LIMIT = 0.8


# ---- what is written today ---------------------------------------------------------------------------------


def _distances(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All distances [N, N], those to an anchor's positives [N, K - 1], and which pairs share a label."""
    d = torch.cdist(x, x)
    same = labels[:, None] == labels[None, :]
    others = same & ~torch.eye(len(x), dtype=torch.bool)
    return d, d[others].view(len(x), -1), same


def semi_hard_eager(x: Tensor, labels: Tensor) -> Tensor:
    d, d_ap, same = _distances(x, labels)
    d_an = d.masked_fill(same, torch.inf)[:, None, :]
    farther = d_an.masked_fill(d_an <= d_ap[:, :, None], torch.inf).amin(dim=2)
    farthest = d.masked_fill(same, -torch.inf).amax(dim=1, keepdim=True)
    return F.relu(d_ap - torch.where(farther.isinf(), farthest, farther) + MARGIN).mean()


def batch_all_eager(x: Tensor, labels: Tensor) -> Tensor:
    d, d_ap, same = _distances(x, labels)
    losses = F.relu(d_ap[:, :, None] - d.masked_fill(same, torch.inf)[:, None, :] + MARGIN)
    return losses.sum() / (losses > 0).sum().clamp(min=1)


def contrastive_eager(x: Tensor, labels: Tensor) -> Tensor:
    d, d_ap, same = _distances(x, labels)
    negatives = F.relu(NEG_MARGIN - d).masked_fill(same, 0)
    return sum(losses.sum() / (losses > 0).sum().clamp(min=1) for losses in (F.relu(d_ap), negatives))


def _metric_learning(loss: str) -> Callable[[Tensor, Tensor], Tensor]:
    from pytorch_metric_learning import distances, losses

    options = {"distance": distances.LpDistance(normalize_embeddings=False)}
    if loss == "batch_all":
        return losses.TripletMarginLoss(margin=MARGIN, **options)
    return losses.ContrastiveLoss(pos_margin=0, neg_margin=NEG_MARGIN, **options)


def _sentence_transformers(loss: str) -> Callable[[Tensor, Tensor], Tensor]:
    from sentence_transformers import losses

    kind = losses.BatchAllTripletLoss if loss == "batch_all" else losses.BatchSemiHardTripletLoss
    module = kind(torch.nn.Identity(), margin=MARGIN)
    return lambda x, labels: module.compute_loss_from_embeddings([x], labels)


OURS = {
    "semi_hard": partial(deepsim_ext.batch_semi_hard_triplet_loss, margin=MARGIN),
    "batch_all": partial(deepsim_ext.batch_all_triplet_loss, margin=MARGIN),
    "contrastive": partial(deepsim_ext.batch_contrastive_loss, neg_margin=NEG_MARGIN),
}
EAGER = {"semi_hard": semi_hard_eager, "batch_all": batch_all_eager, "contrastive": contrastive_eager}
# Library, the losses that it has, and bytes that a triple (or, for contrastive, a pair) of rows takes there.
LIBRARIES = {
    "pytorch-metric-learning": (_metric_learning, {"batch_all": 3, "contrastive": 60}),
    "sentence-transformers": (_sentence_transformers, {"batch_all": 12, "semi_hard": 12}),
}


def _on_lists(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
    return lambda leaves, constants: function(leaves[0], constants[0])


def case_name(loss: str, n: int) -> str:
    return f"{loss} N={n} D={D} K={K}"


def draw(n: int) -> Inputs:
    return Inputs([torch.randn(n, D)], [balanced_labels(n, K)])


def contenders(loss: str, n: int) -> list[Contender]:
    found = [
        product_contender(),
        Contender("deepsim_ext", _on_lists(OURS[loss]), min_runs=9),
        Contender("torch eager", _on_lists(EAGER[loss]), skip=does_not_fit(24 * n * n * K)),
    ]
    for library, (make, losses) in LIBRARIES.items():
        if loss not in losses:
            continue
        skip = does_not_fit(losses[loss] * n ** (2 if loss == "contrastive" else 3))
        try:
            function = make(loss)
        except ImportError as error:
            function, skip = EAGER[loss], str(error)
        found.append(Contender(library, _on_lists(function), skip=skip))
    return found


def probe(loss: str, n: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One forward + backward of ours, and a small one to warm up (see memory.py)."""
    contender = contenders(loss, 64)[1]

    def step(rows: int) -> Callable[[], object]:
        inputs = draw(rows)
        leaves = fresh_leaves(contender, inputs)
        return lambda: contender.function(leaves, inputs.constants).backward()

    return step(int(n)), step(64)


def time_case(loss: str, n: int, seconds: float) -> list[Record]:
    torch.manual_seed(0)
    exact = Contender("float64", _on_lists(EAGER[loss]))
    measured = measure(contenders(loss, n), lambda: draw(n), exact, seconds=seconds)
    add_rates(measured, {}, product=PRODUCT, baseline="torch eager")
    return [{"op": NAME, "kind": "time", "case": case_name(loss, n)} | record for record in measured]


def memory_case(loss: str, n: int) -> list[Record]:
    """Beyond the gradient and some bytes for each positive pair, of which there are few here."""
    allowed = n * D * 4 + (K + 64) * 8 * n
    contender = contenders(loss, 64)[1]
    record = memory_record(contender, allowed, f"{__name__}:probe", loss, n)
    return [{"op": NAME, "kind": "memory", "case": case_name(loss, n)} | record]


def neighbors_case(n: int, k: int, seconds: float) -> list[Record]:
    """k nearest neighbours of every row among the others; faiss, which counts a row itself, finds k + 1."""
    torch.manual_seed(0)
    ways = {
        PRODUCT: product(),
        "deepsim_ext": lambda x: deepsim_ext.nearest_neighbors(x, None, k).indices,
        "torch eager": lambda x: torch.cdist(x, x).fill_diagonal_(torch.inf).topk(k, largest=False).indices,
    }
    skipped = []
    try:
        import faiss

        def flat(x: Tensor) -> Tensor:
            index = faiss.IndexFlatL2(x.shape[1])
            index.add(x.numpy())
            return torch.from_numpy(index.search(x.numpy(), k + 1)[1][:, 1:])

        ways["faiss IndexFlatL2"] = flat
    except ImportError as error:
        skipped = [{"contender": "faiss IndexFlatL2", "skipped": str(error)}]
    case = f"nearest_neighbors N={n} D={D} k={k}"
    x = torch.randn(n, D)
    exact = ways["torch eager"](x.double())
    valid = {
        name: float((way(x) == exact).double().mean()) > 0.999
        for name, way in ways.items()
        if name != PRODUCT
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    while sum(times["deepsim_ext"]) < seconds or len(times["deepsim_ext"]) < 9:
        inputs = Inputs([torch.randn(n, D)], [])
        for name in list(ways)[:: 1 if len(times["deepsim_ext"]) % 2 == 0 else -1]:
            step = Contender(name, lambda xs, _, way=ways[name]: way(xs[0]), differentiable=False)
            times[name].append(run_once(step, inputs)["forward"])
    records = [{"contender": name, "phase": "forward"} | summary(t) for name, t in times.items()]
    for record in records:
        if record["contender"] in valid:
            record["valid"] = valid[record["contender"]]
    add_rates(records, {}, product=PRODUCT, baseline="torch eager")
    return [{"op": NAME, "kind": "time", "case": case} | record for record in [*records, *skipped]]


def jobs(quick: bool) -> list[tuple[str, Callable[[], list[Record]]]]:
    """What there is to measure, each with its name."""
    seconds = 0.3 if quick else 1.0
    sizes = QUICK_SIZES if quick else SIZES
    found = [
        (case_name(loss, n), partial(time_case, loss, n, seconds)) for n in sizes for loss in RATIO_LIMITS
    ]
    found += [
        (f"memory {case_name(loss, max(sizes))}", partial(memory_case, loss, max(sizes)))
        for loss in RATIO_LIMITS
    ]
    n, k = (512, 10) if quick else NEIGHBORS
    return [*found, (f"nearest_neighbors N={n}", partial(neighbors_case, n, k, seconds))]


def bars(records: list[Record]) -> list[Bar]:
    """What the project promises, with the measured figures."""
    valid = [r for r in records if "skipped" not in r and r.get("valid", True)]

    def figure(case: str, contender: str, phase: str, key: str) -> float | None:
        of_case = (r for r in valid if r["case"] == case and r["contender"] == contender)
        return next((r[key] for r in of_case if r.get("phase") == phase), None)

    result = []
    for loss, limit in RATIO_LIMITS.items():
        case = case_name(loss, 4096)
        ratio = figure(case, "deepsim_ext", "both", "product_ratio")
        result.append(Bar(f"{case}, time over one {PRODUCT}", ratio, at_most=limit))
    for loss in RATIO_LIMITS:
        case = case_name(loss, 4096)
        beyond = next((r["beyond_bytes"] for r in valid if r["case"] == case and "beyond_bytes" in r), None)
        mebibytes = None if beyond is None else beyond / 2**20
        text = f"{case}, peak MiB beyond gradient and (K + 64) 8 N bytes"
        result.append(Bar(text, mebibytes, at_most=MEMORY_LIMIT / 2**20))
    for library, (_, losses) in LIBRARIES.items():
        for loss in losses:
            if loss == "contrastive":
                continue
            case = case_name(loss, 1024)
            times = [figure(case, name, "both", "p50_ms") for name in (library, "deepsim_ext")]
            speedup = None if None in times else times[0] / times[1]
            result.append(Bar(f"{case}, speed-up over {library}", speedup, at_least=LISTED_LIMIT))
    case = f"nearest_neighbors N={NEIGHBORS[0]} D={D} k={NEIGHBORS[1]}"
    ratio = figure(case, "deepsim_ext", "forward", "product_ratio")
    result.append(Bar(f"{case}, time over one {PRODUCT}", ratio, at_most=NEIGHBORS_LIMIT))
    times = [figure(case, name, "forward", "p50_ms") for name in ("faiss IndexFlatL2", "deepsim_ext")]
    speedup = None if None in times else times[0] / times[1]
    return [*result, Bar(f"{case}, speed-up over faiss IndexFlatL2", speedup, at_least=1)]
