"""The 5 nearest of a million rows: `nearest_neighbors` and faiss' exact index, for many queries and for one.

faiss searches an index that was filled before; `nearest_neighbors` gets the gallery as it is. A thousand
queries are 2 Q G D = 256 GFLOP; a single one reads the gallery once, 512 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import deepsim_ext

from .memory import memory_record
from .report import Bar
from .timing import Contender, Inputs, Record, run_once, summary

NAME = "gallery"
ROWS, QUICK_ROWS = 1_000_000, 20_000
QUERIES = (1000, 1)
D, K = 128, 5
FAISS = "faiss IndexFlatL2"
MIN_RUNS = 5
# What may be beyond the packed copy of the gallery: its order and norms, lists of candidates.
MEMORY_LIMIT = 64 * 2**20


def case_name(rows: int, queries: int) -> str:
    return f"gallery G={rows} Q={queries} D={D} k={K}"


def search(queries: Tensor, gallery: Tensor) -> Tensor:
    return deepsim_ext.nearest_neighbors(queries, gallery, K).indices


def time_case(rows: int, queries: int, seconds: float) -> list[Record]:
    case = {"op": NAME, "kind": "time", "case": case_name(rows, queries)}
    torch.manual_seed(0)
    gallery = torch.randn(rows, D)
    ways: dict[str, Callable[[Tensor], Tensor]] = {"deepsim_ext": lambda q: search(q, gallery)}
    skipped = []
    try:
        import faiss

        index = faiss.IndexFlatL2(D)
        index.add(gallery.numpy())
        ways[FAISS] = lambda q: torch.from_numpy(index.search(q.numpy(), K)[1])
    except ImportError as error:
        skipped = [{"contender": FAISS, "skipped": str(error)}]
    asked = torch.randn(queries, D)
    found = {name: way(asked) for name, way in ways.items()}
    valid = all(float((f == found["deepsim_ext"]).double().mean()) > 0.999 for f in found.values())
    times: dict[str, list[float]] = {name: [] for name in ways}
    while sum(times["deepsim_ext"]) < seconds or len(times["deepsim_ext"]) < MIN_RUNS:
        inputs = Inputs([torch.randn(queries, D)], [])
        for name in list(ways)[:: 1 if len(times["deepsim_ext"]) % 2 == 0 else -1]:
            step = Contender(name, lambda xs, _, way=ways[name]: way(xs[0]), differentiable=False)
            times[name].append(run_once(step, inputs)["forward"])
    records = [
        {"contender": name, "phase": "forward", "valid": valid} | summary(t) for name, t in times.items()
    ]
    return [case | record for record in [*records, *skipped]]


def probe(rows: str, queries: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """One search, and a small one to warm up (see memory.py)."""
    gallery, asked = torch.randn(int(rows), D), torch.randn(int(queries), D)
    return (lambda: search(asked, gallery)), (lambda: search(asked[:32], gallery[:1000]))


def memory_case(rows: int, queries: int) -> list[Record]:
    packed = rows * D * torch.float32.itemsize
    contender = Contender("deepsim_ext", search, differentiable=False)
    measured = memory_record(contender, packed, f"{__name__}:probe", rows, queries)
    return [{"op": NAME, "kind": "memory", "case": case_name(rows, queries)} | measured]


def jobs(quick: bool) -> list[tuple[str, Callable[[], list[Record]]]]:
    """What there is to measure, each with its name."""
    rows, seconds = (QUICK_ROWS, 0.1) if quick else (ROWS, 1.0)
    times = [(case_name(rows, q), partial(time_case, rows, q, seconds)) for q in QUERIES]
    return [*times, (f"memory {case_name(rows, QUERIES[0])}", partial(memory_case, rows, QUERIES[0]))]


def bars(records: list[Record]) -> list[Bar]:
    """What the project promises, with the measured figures."""
    times = {(r["case"], r["contender"]): r["p50_ms"] for r in records if "p50_ms" in r and r["valid"]}
    found = []
    for queries in QUERIES:
        case = case_name(ROWS, queries)
        ours, theirs = times.get((case, "deepsim_ext")), times.get((case, FAISS))
        ratio = None if None in (ours, theirs) else ours / theirs
        found.append(Bar(f"{case}, time over {FAISS}", ratio, at_most=1.5))
    beyond = next((r["beyond_bytes"] for r in records if "beyond_bytes" in r), None)
    text = f"{case_name(ROWS, QUERIES[0])}, peak MiB beyond one packed copy of the gallery"
    return [*found, Bar(text, None if beyond is None else beyond / 2**20, at_most=MEMORY_LIMIT / 2**20)]
