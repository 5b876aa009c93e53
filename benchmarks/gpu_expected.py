"""`python -m benchmarks.gpu_expected`: what the CUDA kernels should take on an H200, from bytes and FLOPs.

To be held against what a GPU takes; for what has not run on one yet, written before. For each stage the
largest of the times that memory, L2, tensor cores and plain arithmetic need; stages follow each other. Writes
results/gpu_expected.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tests.samples import VGG19_LAYERS

# Of an H200, dense. wgmma reaches some three quarters of the figure given, mma.sync two thirds of that.
MULTIPROCESSORS = 132
MEMORY = 4.8e12  # bytes/s
L2 = 5.5e12
HALF_FLOPS = {"wgmma": 0.75 * 989e12, "mma": 0.5 * 989e12}
TF32_FLOPS = 0.5 * 494e12  # by mma
PLAIN = MULTIPROCESSORS * 128 * 1.755e9  # float32 instructions/s
LAUNCH = 2.5e-6  # seconds from one kernel to the next

TILE = 128
SHALLOW = 384  # columns: of deeper float32 rows one block fits on a multiprocessor
SQUARE = 8  # tiles on a side of what runs together
# Instructions on a tile's element: half norms, scales, comparisons along the row and along the column.
REDUCE_INSTRUCTIONS = 7
STAYING = 3 * 128  # bytes of rows that stay in shared memory for tiles beside each other, if there is wgmma
MOST_RANKED = 65536  # numbers that are sorted in two launches
RUN = 512  # of these, that are sorted by counting


@dataclass
class Stage:
    """One kernel."""

    name: str
    memory: float = 0  # bytes
    l2: float = 0  # bytes
    tensor: float = 0  # seconds
    plain: float = 0  # instructions
    launches: int = 1

    @property
    def seconds(self) -> float:
        work = max(self.memory / MEMORY, self.l2 / L2, self.tensor, self.plain / PLAIN)
        return work + self.launches * LAUNCH


def sort(name: str, count: int, by_torch: Stage) -> Stage:
    """By runs, each number compared with all of its own and found in the others in ten steps."""
    if count > MOST_RANKED:
        return by_torch
    return Stage(name, plain=4 * count * RUN + 120 * count * count / RUN, launches=2)


def sort_labels(n: int) -> Stage:
    return sort("sort", n, Stage("sort", memory=8 * 16 * n, launches=20))


def packed_row(d: int, split: bool) -> int:
    """Bytes of a row of an operand."""
    return math.ceil(d / (32 if split else 64)) * 128


def search(tiles: float, d: int, split: bool, way: str) -> Stage:
    """So many tiles of products and what is looked for in them."""
    row = packed_row(d, split)
    blocks_at_once = MULTIPROCESSORS * (1 if split and d > SHALLOW else 2)
    waves = math.ceil(tiles / blocks_at_once)
    full = waves * blocks_at_once  # the last wave takes as long as the others
    # Tiles of one row that a block takes one after another, some six times. That not all blocks have as many,
    # a tenth at N=16,384, is left out.
    stays = way == "wgmma" and row <= STAYING
    stretch = 1
    while stays and stretch < SQUARE and tiles >= 6 * 2 * stretch * blocks_at_once:
        stretch *= 2
    flops = 2 * TILE * TILE * row / 2 * (2 if split else 1)
    return Stage(
        f"tiles: {tiles:.0f} in {waves} waves",
        memory=tiles * TILE * row * 2 / SQUARE,
        l2=full * TILE * row * (1 + 1 / stretch),
        tensor=full * flops / HALF_FLOPS[way],
        plain=full * TILE * TILE * REDUCE_INSTRUCTIONS,
    )


def batch_hard(n: int, d: int, split: bool, itemsize: int, way: str) -> list[Stage]:
    """Forward and backward of the self form by tiles."""
    rows_down = math.ceil(n / TILE)
    x = n * d * itemsize
    centre = [Stage("centre", memory=x, launches=2)] if itemsize == 4 else []
    return [
        Stage("flags", launches=2),
        sort_labels(n),
        *centre,
        Stage("pack", memory=x + n * packed_row(d, split)),
        search(rows_down * (rows_down + 1) / 2, d, split, way),
        Stage("choose again: whether anybody has to", memory=40 * n),
        Stage("distances and loss", memory=3 * x),
        sort("sort choices", 2 * n, Stage("sort choices", memory=4 * 24 * n, launches=12)),
        Stage("gradient", memory=6 * x, launches=3),
    ]


def extremes(n: int, d: int, split: bool, itemsize: int, way: str) -> list[Stage]:
    """The search of a block of n rows of one process and n of another, for both."""
    return [
        sort_labels(n),
        sort_labels(n),
        Stage("pack", memory=2 * n * (d * itemsize + packed_row(d, split)), launches=2),
        search(math.ceil(n / TILE) ** 2, d, split, way),
        Stage("write", memory=2 * n * (16 + 20), launches=2),
    ]


def all_pairs(n: int, d: int) -> list[Stage]:
    """Forward and backward of batch-all, every negative active and no pair close; float32 in any storage."""
    stripe = min(n, max(64, 2**22 // n // 64 * 64))
    stripes = math.ceil(n / stripe)
    product = 3 * 2 * n * n * d / TF32_FLOPS
    matrix = 4 * n * n
    marks = n * n / 8
    return [
        Stage("centre", memory=3 * 4 * n * d, launches=3),
        Stage(
            "distances",
            # Rows of both sides of a tile of 64 x 128.
            l2=matrix + n * n * d * 4 * (1 / 64 + 1 / 128),
            tensor=product,
            launches=stripes,
        ),
        # A distance, a label and a half norm are read, a strength is written. Instructions as in the SASS.
        Stage("rows", l2=3 * matrix + 8 * n * n, plain=140 * n * n, launches=stripes),
        Stage(
            "pull",
            # Strengths by tiles of 128 elements of a row, others by tiles of 64 rows; parts of sums.
            l2=2 * (matrix * math.ceil(d / 128) + n * n * d * 4 / 64) + 2 * 132 * stripes * 64 * 128 * 4,
            tensor=2 * product,
            launches=3 * stripes,
        ),
        Stage("sums of strengths, single pairs", l2=matrix + 2 * marks, launches=3 * stripes),
        Stage("finish", memory=8 * n * d, launches=3),
    ]


def given_triplets(t: int, d: int, itemsize: int) -> list[Stage]:
    """Of t triplets: a warp reads three rows, and in backward writes three."""
    rows = 3 * t * d * itemsize
    convert = 2 * 3 * t * d / 16 * 128  # to double, of which a multiprocessor does 16 at a time
    return [
        Stage("losses", memory=rows, plain=convert, launches=2),
        Stage("gradient", memory=2 * rows, plain=8 * t * d),
    ]


def listed_pairs(t: int, n: int, d: int, itemsize: int) -> list[Stage]:
    """Distances of t pairs of n rows, a warp for a pair, and their gradient, a warp for a row."""
    rows = 2 * t * d * itemsize
    convert = 2 * t * d / 16 * 128  # to double, of which a multiprocessor does 16 at a time
    # A lane has 4 columns of a row, three instructions each, and 28 for the pair.
    parts = math.ceil(d / 128)
    radix = Stage("sort", memory=8 * 16 * t, launches=20)
    return [
        Stage("distances", l2=rows, plain=convert),
        Stage("flags"),
        sort("sort", t, radix),
        sort("sort", t, radix),
        Stage(
            "gradients",
            memory=2 * n * d * (itemsize + 4),
            l2=rows + 2 * 32 * t,
            plain=2 * t * parts * 32 * 40,
            launches=2,
        ),
    ]


def neighbors(n: int, d: int) -> list[Stage]:
    """The search of a few nearest of each row, few others being as near; float32 in any storage."""
    stripe = min(n, max(64, 2**23 // n // 64 * 64))
    stripes = math.ceil(n / stripe)
    matrix = 4 * n * n
    candidates = 16  # of a row, that are measured; each of the groups that they are in is read
    passes = 4  # over the least of groups, for the digits of the limit and for what is within it
    return [
        Stage("centre", memory=3 * 4 * n * d, launches=3),
        Stage(
            "half squares",
            l2=matrix + n * n * d * 4 * (1 / 64 + 1 / 128),
            tensor=3 * 2 * n * n * d / TF32_FLOPS,
            launches=stripes,
        ),
        Stage(
            "rows",
            l2=passes * matrix / 32 + candidates * n * (d * 4 + 128),
            plain=passes * 20 * n * n / 32 + candidates * n * 6 * d,
            launches=stripes,
        ),
    ]


def style(side: int, itemsize: int) -> list[Stage]:
    """Forward and backward of the five layers of VGG19, all of them in two launches each way."""
    stages = [Stage("launches", launches=4)]
    line = 128 // itemsize  # positions in a chunk
    products, flops_rate = (3, TF32_FLOPS) if itemsize == 4 else (1, HALF_FLOPS["mma"])
    for name, (channels, factor) in VGG19_LAYERS.items():
        positions = (side // factor) ** 2
        features = channels * positions * itemsize
        down = math.ceil(channels / 64)
        tiles = down * (down + 1) / 2
        slices = max(1, min(math.ceil(396 / tiles), positions // (16 * line)))
        stages.append(
            Stage(
                f"{name} forward",
                memory=features,
                # Rows of both sides, those of the diagonal once; sums of slices, written and read.
                l2=features * down + 2 * tiles * slices * 64 * 64 * 4,
                tensor=2 * 64 * 64 * positions * tiles * products / flops_rate,
                launches=0,
            )
        )
        stages.append(
            Stage(
                f"{name} gradient",
                memory=2 * features,
                # Features by tiles of 64 channels; four bytes of the matrix by tiles of 128 positions.
                l2=features * down + 4 * channels * channels * positions / 128,
                tensor=2 * channels * channels * positions * max(2, products) / flops_rate,
                launches=0,
            )
        )
    return stages


def main() -> int:
    lines = ["# Expected on an H200", "", __doc__.split("\n\n", 1)[1].strip(), ""]
    lines += [
        "Microseconds of forward + backward (of the search for neighbors and for two processes' rows), and",
        "the stages that make them up.",
        "",
    ]
    lines += ["| case | total | stages |", "| --- | ---: | --- |"]
    cases = [
        (f"batch-hard N={n} D={d} {name}, {way}", batch_hard(n, d, split, itemsize, way))
        for way in HALF_FLOPS
        for name, split, itemsize in (("float32", True, 4), ("tf32", False, 4), ("bfloat16", False, 2))
        for n in (4096, 16384, 65536)
        for d in (128, 512)
    ]
    cases += [
        (f"batch-hard of two processes' {n} rows D=128 {name}", extremes(n, 128, split, itemsize, "wgmma"))
        for name, split, itemsize in (("float32", True, 4), ("bfloat16", False, 2))
        for n in (4096, 16384)
    ]
    cases += [(f"batch-all N={n} D={d}", all_pairs(n, d)) for n in (1024, 4096, 16384) for d in (128, 512)]
    cases += [(f"neighbors N={n} D={d}", neighbors(n, d)) for n in (4096, 16384, 65536) for d in (128, 512)]
    cases += [
        (f"given triplets T={t} D=128 {name}", given_triplets(t, 128, itemsize))
        for name, itemsize in (("float32", 4), ("bfloat16", 2))
        for t in (1024, 16384, 131072)
    ]
    cases += [
        (f"listed pairs T={t} N=4096 D=128 {name}", listed_pairs(t, 4096, 128, itemsize))
        for name, itemsize in (("float32", 4), ("bfloat16", 2))
        for t in (16384, 262144)
    ]
    cases += [
        (f"style {s}x{s} {name}", style(s, itemsize))
        for name, itemsize in (("float32", 4), ("bfloat16", 2))
        for s in (256, 512, 1024)
    ]
    for case, stages in cases:
        total = sum(stage.seconds for stage in stages)
        parts = ", ".join(f"{stage.name} {1e6 * stage.seconds:.0f}" for stage in stages)
        lines.append(f"| {case} | {1e6 * total:.0f} | {parts} |")
    path = Path(__file__).parent / "results" / "gpu_expected.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
