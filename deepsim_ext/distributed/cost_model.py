"""What batch-hard over the ring of `DistributedLoss` costs for any number of ranks: bytes, FLOPs, seconds.

N rows of D entries on R ranks, n = N / R of them on each; b bytes an entry, c bytes an entry of the
arithmetic (4, or 8 for float64). Forward with its gradient, which is all there is: backward only scales.

Arithmetic. Own rows meet each other, n^2 / 2 pairs, and every two blocks meet once: n^2 pairs a step, in
R // 2 steps; where R is even the last step's pairs are shared by the two that meet. So a rank has n N / 2
pairs of 2 D FLOPs, N^2 D / R in all, for R odd or even. It then measures and pulls at the 2 n chosen pairs.

Bytes that a rank sends:
    labels   8 n to each of the others.
    center   the sum of 19 rows of float64, an all-reduce: 2 (R - 1) / R times that.
    blocks   n D b in each of the R // 2 steps, all to the next rank.
    found    of every visited row two values and two indices, 2 c + 16 bytes, home: n rows a step, and where R
             is even 3/4 n in the last one, on average, as one of the two that meet is halved.
    chosen   rows that lie elsewhere, at most 2 n (R - 1) / R of them if labels are spread evenly: an index,
             the row, and its gradient, D c.

Time. The own block's pairs come first, then the first block arrives, which nothing hides. While a step is
worked on, the next block and what the last step found travel: on links that need no arithmetic unit, the step
takes the longer of the two, else both. The last step sends its findings home unhidden. Then come the chosen
rows. Small messages take `latency` each: one of the all-reduces and all-gathers log2(R) one after another, an
all-to-all R - 1. Not in it: ranks that wait for a slower one, and the choosing again of anchors whose
distances lost their digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

CENTER_ROWS = 19  # sum, count of zero rows, 17 samples
GATHERS = 6  # all-gathers and all-reduces of a call
ALL_TO_ALLS = 4  # of counts, indices, chosen rows and their gradients


class Machine(NamedTuple):
    """What one rank has."""

    name: str
    rate: float  # FLOP/s of the tiles, two for each entry of a pair
    bandwidth: float  # bytes/s that leave a rank while as many arrive
    latency: float  # seconds of a small message
    chosen_rate: float  # entries/s of chosen pairs that are measured and pulled at
    overlaps: bool  # whether bytes travel while tiles are worked on
    assumptions: str


# A step of N=65536 D=128 float32, forward and backward, on an H200 (benchmarks/results/gpu_stages.md).
_H200_TILES, _H200_REST = 4.61e-3, 0.61e-3  # seconds
_H200_RATE = 65536**2 * 128 / _H200_TILES
_H200_CHOSEN_RATE = 2 * 65536 * 128 / _H200_REST
_H200 = (
    "tiles and all else as fast as in a step of N=65536 D=128 float32 on an H200, where they were measured to"
    " take 4.6 and 0.6 ms, also for other D and dtypes and for the tiles of two blocks, which have not run on"
    " a GPU; bytes travel beside the arithmetic"
)
MACHINES = {
    m.name: m
    for m in (
        Machine(
            "h200-nvlink",
            _H200_RATE,
            450e9,
            5e-6,
            _H200_CHOSEN_RATE,
            True,
            f"{_H200}; NVLink, 450 GB/s each way, between all ranks",
        ),
        Machine(
            "h200-infiniband",
            _H200_RATE,
            50e9,
            10e-6,
            _H200_CHOSEN_RATE,
            True,
            f"{_H200}; InfiniBand, 400 Gb/s each way for every GPU, without NVLink inside a node",
        ),
    )
}


class Problem(NamedTuple):
    """rows N in all, dim D; entry_bytes of the embeddings, compute_bytes of the arithmetic."""

    rows: int
    dim: int
    ranks: int
    entry_bytes: int = 4
    compute_bytes: int = 4

    @property
    def rows_of_rank(self) -> float:
        return self.rows / self.ranks

    @property
    def steps(self) -> int:
        return self.ranks // 2


class Sent(NamedTuple):
    """Bytes that a rank sends, the average over ranks."""

    labels: float
    center: float
    blocks: float
    found: float
    chosen: float

    @property
    def total(self) -> float:
        return sum(self)


class Time(NamedTuple):
    """Seconds; `total` is not the sum of the others where some bytes travel beside the arithmetic."""

    arithmetic: float
    chosen_pairs: float
    transfer: float  # were it alone
    exposed: float  # of transfer, latency included: what adds to the total
    total: float


def flops(problem: Problem) -> float:
    """Of a rank."""
    return problem.rows**2 * problem.dim / problem.ranks


def sent(problem: Problem, chosen_elsewhere: float | None = None) -> Sent:
    """chosen_elsewhere: distinct rows that a rank asks others for; None for the most, spread evenly."""
    n, d, ranks, b, c = problem.rows_of_rank, *problem[1:]
    if ranks == 1:
        return Sent(0, 0, 0, 0, 0)
    if chosen_elsewhere is None:
        chosen_elsewhere = 2 * n * (ranks - 1) / ranks
    visited = n * (problem.steps - (1 / 4 if ranks % 2 == 0 else 0))
    return Sent(
        labels=8 * n * (ranks - 1),
        center=2 * (ranks - 1) / ranks * CENTER_ROWS * 8 * d,
        blocks=problem.steps * n * d * b,
        found=visited * (2 * c + 16),
        chosen=chosen_elsewhere * (8 + d * b + d * c),
    )


def predict(problem: Problem, machine: Machine) -> Time:
    """Of one call, forward with gradient."""
    n, ranks, steps = problem.rows_of_rank, problem.ranks, problem.steps
    arithmetic = flops(problem) / machine.rate
    chosen_pairs = 2 * n * problem.dim / machine.chosen_rate
    if ranks == 1:
        return Time(arithmetic, chosen_pairs, 0.0, 0.0, arithmetic + chosen_pairs)
    bytes_sent = sent(problem)
    block = bytes_sent.blocks / steps / machine.bandwidth + machine.latency
    found = bytes_sent.found / steps / machine.bandwidth + 2 * machine.latency
    alone = (bytes_sent.labels + bytes_sent.center + bytes_sent.chosen) / machine.bandwidth
    alone += machine.latency * (GATHERS * math.ceil(math.log2(ranks)) + ALL_TO_ALLS * (ranks - 1))
    transfer = alone + steps * (block + found)
    exposed = transfer
    if machine.overlaps:
        meeting = 2 * n**2 * problem.dim / machine.rate
        exposed = alone + block + found  # the first block and the last findings
        for step in range(1, steps + 1):
            work = meeting / 2 if step == steps and ranks % 2 == 0 else meeting
            beside = (block if step < steps else 0.0) + (found if step > 1 else 0.0)
            exposed += max(0.0, beside - work)
    return Time(arithmetic, chosen_pairs, transfer, exposed, arithmetic + chosen_pairs + exposed)
