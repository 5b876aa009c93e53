"""Ten thousand random calls, good and bad, of the functions and the raw ops: each returns properly or raises.

They run in one process, which notes the number of a call before it makes it. To repeat the one that crashed:

    python -m tests.test_fuzz 4711
"""

from __future__ import annotations

import collections
import faulthandler
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deepsim_ext

ROOT = Path(__file__).resolve().parent.parent
CALLS = 10_000
# MemoryError: some of the sizes exist on paper only.
ERRORS = (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError, MemoryError)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ODD_DTYPES = (
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
    torch.complex64,
    torch.complex32,
    torch.float8_e4m3fn,
)
INT32 = torch.iinfo(torch.int32)


class Draw:
    """Random arguments, from the number of the call."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        # One call in three is meant to be right, so that random layouts and values get past the checks.
        self.badness = self.random.choice((0.0, 0.08, 0.3))

    def bad(self) -> bool:
        return self.random.random() < self.badness

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def size(self, most: int) -> int:
        return self.pick(0, 1, 2, 3) if self.random.random() < 0.1 else self.random.randint(1, most)

    def junk(self) -> Any:
        """Anything but what was asked for."""
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        return self.pick(
            None, 3, -1.5, float("nan"), 10**400, "euclidean", "", "\x00", b"mean", [], [1, 2], {}, object(),
            torch.zeros(()), torch.ones(2, 2), torch.arange(3), torch.ones(3, 4, 5).to_sparse(),
            [torch.ones(2, 3, 4)], (None,), True, torch.float32, nested,
            torch.nn.Parameter(torch.ones(2, 3)), torch.ones(4, 3, device="meta"),
        )  # fmt: skip

    def layout(self, x: Tensor) -> Tensor:
        """The same values under other strides, or none of their own."""
        kind = self.random.randrange(9)
        if kind == 0 and x.ndim >= 2:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 1 and x.ndim >= 1:
            return x.repeat_interleave(3, -1)[..., ::3]
        if kind == 2 and x.ndim >= 1 and x.shape[0]:
            return x[:1].expand(x.shape)
        if kind == 3 and x.ndim >= 1 and x.shape[-1]:
            return x[..., :1].expand(x.shape)
        if kind == 4 and x.ndim >= 1 and x.shape[0] == 1:
            return x.as_strided(
                x.shape, (2**60, *x.stride()[1:])
            )  # the stride of a dimension of size 1 is never used
        if kind == 5 and x.dtype in FLOATS:
            return torch._neg_view(-x)
        return x

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Any:
        """A float tensor of the shape, or one that differs in something."""
        dtype = dtype or self.pick(*FLOATS)
        if self.bad():
            kind = self.random.randrange(12)
            if kind == 0:
                return self.junk()
            if kind == 1:
                dtype = self.pick(*ODD_DTYPES, *FLOATS)
            elif kind == 2:
                shape = shape[:-1]
            elif kind == 3:
                shape = (*shape, self.pick(0, 1, 2))
            elif kind == 4:
                shape = tuple(self.pick(s, s + 1, 0) for s in shape)
            elif kind == 5:
                return torch.empty(shape, dtype=dtype, device="meta")
            elif kind == 6 and len(shape) > 1:
                return torch.randn(shape).to_sparse()
            elif kind == 7 and len(shape) == 2:
                return (
                    torch.randn(shape).to_sparse_csr() if 0 not in shape else torch.zeros(shape).to_sparse()
                )
            elif kind == 8:
                huge = self.pick(2**31, 2**40, 2**48)
                return torch.zeros((1,) * len(shape), dtype=dtype).expand((huge, *shape[1:]) if shape else ())
            elif kind == 9:
                return torch.quantize_per_tensor(torch.randn(shape), 0.1, 0, torch.qint8)
        x = torch.randn(shape, generator=self.generator)
        if self.bad():
            x *= self.pick(0.0, 1e30, 1e-30, float("nan"), float("inf"))
        x = x.to(dtype)
        if dtype not in FLOATS:
            return x
        x = self.layout(x)
        return x.requires_grad_() if self.pick(True, False) and x.is_leaf else x

    def labels(self, n: int) -> Any:
        if self.bad():
            return self.pick(
                self.junk(), self.floats(n), torch.zeros(n, 1, dtype=torch.int64), torch.arange(n + 1),
                torch.zeros(n, dtype=torch.int32), torch.arange(n, device="meta"), list(range(n)),
                torch.zeros(n, requires_grad=True), torch.zeros(1, dtype=torch.int64).expand(2**31),
            )  # fmt: skip
        classes = self.pick(1, 2, max(n // 2, 1), 2**62)
        return self.layout(torch.randint(-classes, classes, (n,), generator=self.generator))

    def indices(self, n: int, rows: int) -> Any:
        """int32 rows as the forward op returns them, or garbage."""
        if self.bad():
            kind = self.random.randrange(5)
            if kind == 0:
                return self.junk()
            if kind == 1:
                return torch.randint(max(rows, 1), (n,), generator=self.generator)  # int64
            if kind == 2:
                return torch.zeros(n + self.pick(-1, 1) if n else 1, dtype=torch.int32)
            low, high = self.pick((INT32.min, INT32.max), (-3, rows + 3), (rows, rows + 1))
            return torch.randint(low, high, (n,), generator=self.generator).to(torch.int32)
        return (
            torch.randint(rows, (n,), generator=self.generator).to(torch.int32)
            if rows
            else torch.full((n,), -1).int()
        )

    def name(self, *choices: str) -> Any:
        return (
            self.pick("l3", "MEAN", "", "meanmean", "\x00", None, 1, b"l2")
            if self.bad()
            else self.pick(*choices)
        )

    def number(self) -> Any:
        bad = (-1.0, float("nan"), float("inf"), None, "1", 10**400, True, [0.2], torch.tensor(0.2), 1j)
        return self.pick(*bad) if self.bad() else self.pick(0.2, 0, 1, 7.5)

    def flag(self) -> Any:
        return self.pick(0, None, "yes", torch.tensor(True)) if self.bad() else self.pick(True, False)


# ---- calls: a function to call, and a check of what it returned --------------------------------------------

Call = tuple[Callable[[], Any], Callable[[Any], bool]]


def is_tensor(x: Any, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> bool:
    return isinstance(x, Tensor) and x.shape == torch.Size(shape) and dtype in (None, x.dtype)


def batch_sets(d: Draw) -> list[Any]:
    n, m, depth, dtype = d.size(40), d.size(40), d.size(20), d.pick(*FLOATS)
    x, labels = d.floats(n, depth, dtype=dtype), d.labels(n)
    form = d.random.randrange(4)
    if form == 0:
        return [x, labels, d.floats(m, depth, dtype=dtype), d.labels(m)]
    if form == 1:
        return [x, labels, x, labels]
    return [x, labels, *((d.junk(), d.junk()) if d.bad() else (None, None))]


DISTANCES = ("euclidean", "sqeuclidean", "cosine")
STRATEGIES = ("hard", "easy", "semihard")
TRIPLET_REDUCTIONS = ("mean", "mean_nonzero", "sum", "none")


def strategies(d: Draw) -> dict[str, Any]:
    return {"positive": d.name(*STRATEGIES), "negative": d.name(*STRATEGIES)}


def mine(d: Draw) -> Call:
    sets, options = batch_sets(d), d.pick({}, strategies(d)) | {"distance": d.name(*DISTANCES)}

    def check(result: Any) -> bool:
        k = len(result[0])
        return len(result) == 3 and k <= len(sets[0]) and all(is_tensor(t, (k,), torch.int64) for t in result)

    return lambda: deepsim_ext.batch_hard_mine(*sets, **options), check


def triplet_loss(d: Draw) -> Call:
    sets = batch_sets(d)
    options = d.pick({}, strategies(d)) | {
        "margin": d.number(),
        "soft": d.flag(),
        "distance": d.name(*DISTANCES),
        "reduction": d.name(*TRIPLET_REDUCTIONS),
        "return_stats": d.flag(),
    }

    def check(result: Any) -> bool:
        loss, *stats = result if options["return_stats"] else (result,)
        shape = sets[0].shape[:1] if options["reduction"] == "none" else ()
        return is_tensor(loss, shape) and len(stats) in (0, 6) and all(is_tensor(s, ()) for s in stats)

    return with_backward(lambda: deepsim_ext.batch_hard_triplet_loss(*sets, **options)), check


def all_pairs(d: Draw) -> Call:
    """A loss over all triplets or pairs of a batch."""
    sets = batch_sets(d)
    function, options = d.pick(
        (deepsim_ext.batch_all_triplet_loss, {"margin": d.number()}),
        (
            deepsim_ext.batch_semi_hard_triplet_loss,
            {"margin": d.number(), "soft": d.flag(), "definition": d.name("facenet", "tfa", "pml")},
        ),
        (
            deepsim_ext.batch_contrastive_loss,
            {"pos_margin": d.number(), "neg_margin": d.number(), "squared": d.flag()},
        ),
    )
    options |= {
        "distance": d.name(*DISTANCES),
        "reduction": d.name("mean", "mean_nonzero", "sum"),
        "return_stats": d.flag(),
    }

    def check(result: Any) -> bool:
        loss, *stats = result if options["return_stats"] else (result,)
        return is_tensor(loss, ()) and len(stats) in (0, 6) and all(is_tensor(s, ()) for s in stats)

    return with_backward(lambda: function(*sets, **options)), check


def neighbors(d: Draw) -> Call:
    q, g, depth, dtype = d.size(40), d.size(40), d.size(20), d.pick(*FLOATS)
    queries, k = d.floats(q, depth, dtype=dtype), d.pick(-1, None, 1.5, 2**70) if d.bad() else d.size(12)
    gallery = d.pick(None, queries, d.floats(g, depth, dtype=dtype))

    def check(result: Any) -> bool:
        shape = (len(queries), k)
        rows = len(queries) if gallery is None else len(gallery)
        shapes_fit = is_tensor(result[0], shape) and is_tensor(result[1], shape, torch.int64)
        if result[1].is_meta:  # queries without values
            return shapes_fit
        return shapes_fit and bool((result[1] >= -1).all() and (result[1] < rows).all())

    distance = d.name(*DISTANCES)
    return lambda: deepsim_ext.nearest_neighbors(queries, gallery, k, distance=distance), check


def contrastive(d: Draw) -> Call:
    n, depth, dtype = d.size(20), d.size(10), d.pick(*FLOATS)
    arguments = [d.floats(n, depth, dtype=dtype), d.floats(n, depth, dtype=dtype), d.labels(n)]
    options = {"margin": d.number(), "reduction": d.name("mean", "sum", "none")}

    def check(result: Any) -> bool:
        return is_tensor(result, arguments[0].shape[:1] if options["reduction"] == "none" else ())

    return with_backward(lambda: deepsim_ext.contrastive_loss(*arguments, **options)), check


def triplet_margin(d: Draw) -> Call:
    t, depth, dtype = d.size(20), d.size(10), d.pick(*FLOATS)
    arguments = [d.floats(t, depth, dtype=dtype) for _ in range(3)]
    options = {name: d.pick(True, False) for name in ("swap", "soft")}
    options |= {"margin": d.number(), "distance": d.name(*DISTANCES)}
    options["reduction"] = d.name("mean", "mean_nonzero", "sum", "none")

    def check(result: Any) -> bool:
        return is_tensor(result, arguments[0].shape[:1] if options["reduction"] == "none" else ())

    return with_backward(lambda: deepsim_ext.triplet_margin_loss(*arguments, **options)), check


def feature_shape(d: Draw) -> list[int]:
    return [d.size(3), d.size(12), *(d.size(9) for _ in range(d.pick(1, 2, 3)))]


def normalization(d: Draw) -> Any:
    return d.number() if d.pick(True, False) else d.name("none", "hw", "chw", "bchw")


def mask_of(d: Draw, features: Any) -> Any:
    """A mask for features of one layer or several, or none."""
    if isinstance(features, list | tuple):
        return d.pick(None, [mask_of(d, f) for f in features])
    dense = isinstance(features, Tensor) and not features.is_nested and features.layout is torch.strided
    if d.bad() or not dense or features.ndim < 3 or features.numel() > 10**6:
        return d.junk()
    batch = d.pick((), (1,), features.shape[:1])
    shape = (*batch, *features.shape[2:])
    return d.pick(None, torch.rand(shape, generator=d.generator) < 0.5, d.floats(*shape))


def gram(d: Draw) -> Call:
    f, normalize = d.floats(*feature_shape(d)), normalization(d)
    mask = mask_of(d, f)

    def check(result: Any) -> bool:
        return is_tensor(result, (f.shape[0], f.shape[1], f.shape[1]))

    return with_backward(lambda: deepsim_ext.gram_matrix(f, normalize=normalize, mask=mask)), check


def layers(d: Draw, one: Callable[[], tuple[Any, Any]]) -> list[Any]:
    """features, targets, weights of one layer or several."""
    if d.bad():
        return [d.junk(), d.junk(), d.junk()]
    if d.pick(True, False):
        return [*one(), None]
    pairs = [one() for _ in range(d.size(3))]
    kind = d.pick(list, tuple)
    weights = kind(d.number() for _ in range(len(pairs) + (d.bad())))
    return [kind(f for f, _ in pairs), kind(t for _, t in pairs), d.pick(None, weights)]


def style(d: Draw) -> Call:
    def one() -> tuple[Any, Any]:
        shape = feature_shape(d)
        f = d.floats(*shape)
        double = isinstance(f, Tensor) and f.dtype is torch.float64
        batch = d.pick((), (1,), shape[:1])
        return f, d.floats(*batch, shape[1], shape[1], dtype=torch.float64 if double else torch.float32)

    features, targets, weights = layers(d, one)
    options = {
        "mask": mask_of(d, features),
        "normalize": normalization(d),
        "reduction": d.name("mean", "sum", "gatys"),
        "distance": d.name("l2", "l1", "frobenius"),
    }
    call = with_backward(lambda: deepsim_ext.style_loss(features, targets, weights=weights, **options))
    return call, lambda result: is_tensor(result, ())


def content(d: Draw) -> Call:
    def one() -> tuple[Any, Any]:
        shape, dtype = feature_shape(d), d.pick(*FLOATS)
        return d.floats(*shape, dtype=dtype), d.floats(*shape, dtype=dtype)

    features, targets, weights = layers(d, one)
    reduction = d.name("mean", "sum", "gatys")
    call = with_backward(
        lambda: deepsim_ext.content_loss(features, targets, weights=weights, reduction=reduction)
    )
    return call, lambda result: is_tensor(result, ())


def total_variation(d: Draw) -> Call:
    image = d.floats(*feature_shape(d))
    options = {"distance": d.name("l2", "l1"), "reduction": d.name("mean", "sum")}
    call = with_backward(lambda: deepsim_ext.total_variation_loss(image, **options))
    return call, lambda result: is_tensor(result, ())


def accumulated(d: Draw) -> Call:
    shape, normalize = feature_shape(d), normalization(d)
    chunks = [d.floats(*shape[:2], *feature_shape(d)[2:], dtype=torch.float32) for _ in range(d.size(3))]

    def call() -> Any:
        accumulator = deepsim_ext.GramAccumulator(normalize=normalize)
        for chunk in chunks:
            accumulator.update(chunk)
        gram = accumulator.result()
        return gram, accumulator.gradient(chunks[0], torch.ones_like(gram))

    def check(result: Any) -> bool:
        b, c = chunks[0].shape[:2]  # which need not be what was meant
        return is_tensor(result[0], (b, c, c)) and is_tensor(result[1], chunks[0].shape)

    return call, check


def with_backward(call: Callable[[], Any]) -> Callable[[], Any]:
    def both() -> Any:
        result = call()
        loss = result.loss if hasattr(result, "loss") else result
        if loss.requires_grad and loss.numel() < 10**6:
            loss.sum().backward()
        return result

    return both


ops = torch.ops.deepsim_ext


def mine_op(d: Draw) -> Call:
    sets, distance = batch_sets(d), d.name(*DISTANCES)
    call = d.pick(
        lambda: ops.batch_hard_mine(*sets, distance),
        lambda: ops.mine_triplets(*sets, *strategies(d).values(), distance),
    )

    def check(result: Any) -> bool:
        return len(result) == 2 and all(is_tensor(t, sets[0].shape[:1], torch.int32) for t in result)

    return call, check


def triplet_loss_op(d: Draw) -> Call:
    sets, options = batch_sets(d), (d.number(), d.flag(), d.name(*DISTANCES), d.name(*TRIPLET_REDUCTIONS))
    call = d.pick(
        lambda: ops.batch_hard_triplet_loss(*sets, *options),
        lambda: ops.mined_triplet_loss(*sets, *strategies(d).values(), *options),
    )

    def check(result: Any) -> bool:
        n = sets[0].shape[:1]
        loss, *others = result
        return is_tensor(loss, n if options[3] == "none" else ()) and all(is_tensor(t, n) for t in others)

    return call, check


def triplet_loss_backward_op(d: Draw) -> Call:
    n, m, depth, dtype = d.size(30), d.size(30), d.size(12), d.pick(*FLOATS)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    x = d.floats(n, depth, dtype=dtype)
    ref = d.floats(m, depth, dtype=dtype) if d.pick(True, False) else None
    rows = n if ref is None else m
    options = (d.number(), d.flag(), d.name(*DISTANCES), d.name(*TRIPLET_REDUCTIONS))
    grad = d.floats(*((n,) if options[3] == "none" else ()), dtype=compute)
    chosen = d.indices(n, rows), d.indices(n, rows)
    saved = (*chosen, d.floats(n, dtype=compute), d.floats(n, dtype=compute))

    with_references = d.flag()

    def check(result: Any) -> bool:
        ref_shape = (0, x.shape[1]) if ref is None or not with_references else ref.shape
        return is_tensor(result[0], x.shape, x.dtype) and is_tensor(result[1], ref_shape, x.dtype)

    arguments = grad, x, ref, *saved, *options, with_references
    return lambda: ops.batch_hard_triplet_loss_backward(*arguments), check


def gram_op(d: Draw) -> Call:
    f, options = (
        d.floats(d.size(3), d.size(40), d.size(60)),
        (d.name("none", "hw", "chw", "bchw"), d.number()),
    )
    return lambda: ops.gram_matrix(f, *options), lambda r: is_tensor(r, (f.shape[0], f.shape[1], f.shape[1]))


def gram_backward_op(d: Draw) -> Call:
    b, c, n, dtype = d.size(3), d.size(40), d.size(60), d.pick(*FLOATS)
    f, options = d.floats(b, c, n, dtype=dtype), (d.name("none", "hw", "chw", "bchw"), d.number())
    grad = d.floats(b, c, c, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    return lambda: ops.gram_matrix_backward(grad, f, *options), lambda r: is_tensor(r, f.shape, f.dtype)


def style_layers(d: Draw) -> tuple[list[Any], list[Any], list[Any]]:
    """features, targets and weights, mostly of one dtype and as many."""
    dtype = d.pick(*FLOATS)
    shapes = [(d.size(3), d.size(40), d.size(60)) for _ in range(d.size(3))]
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    features = [d.floats(*shape, dtype=dtype) for shape in shapes]
    targets = [d.floats(d.pick(1, b), c, c, dtype=compute) for b, c, _ in shapes]
    weights = [d.number() for _ in range(len(shapes) + d.bad())]
    return features, targets, weights


def style_options(d: Draw) -> tuple[Any, ...]:
    return (
        d.name("none", "hw", "chw", "bchw"),
        d.number(),
        d.name("mean", "sum", "gatys"),
        d.name("l2", "l1", "frobenius"),
    )


def style_op(d: Draw) -> Call:
    features, targets, weights = style_layers(d)
    options = style_options(d)

    def check(result: Any) -> bool:
        squares = sum(f.shape[0] * f.shape[1] ** 2 for f in features)
        return (
            is_tensor(result[0], ())
            and is_tensor(result[1], (len(features),))
            and is_tensor(result[2], (squares,))
        )

    return lambda: ops.style_loss(features, targets, weights, *options), check


def style_backward_op(d: Draw) -> Call:
    features, targets, weights = style_layers(d)
    sizes = [f.shape[0] * f.shape[1] ** 2 for f in features if isinstance(f, Tensor) and f.ndim == 3]
    squares = min(sum(sizes), 10**5)  # beyond that it is a shape that is refused
    double = any(isinstance(t, Tensor) and t.dtype is torch.float64 for t in targets)
    compute = torch.float64 if double else torch.float32
    saved = [
        d.floats(dtype=compute),
        d.floats(len(features), dtype=compute),
        d.floats(squares, dtype=compute),
    ]
    wanted = [d.pick(True, False) for _ in range(len(features) + d.bad())]
    options = style_options(d)

    def check(result: Any) -> bool:
        shapes = [f.shape if w else (0,) for f, w in zip(features, wanted, strict=True)]
        return all(is_tensor(r, s, f.dtype) for r, s, f in zip(result, shapes, features, strict=True))

    return lambda: ops.style_loss_backward(*saved, features, wanted, weights, *options), check


FUNCTIONS = (
    mine,
    triplet_loss,
    triplet_loss,
    all_pairs,
    all_pairs,
    neighbors,
    contrastive,
    triplet_margin,
    gram,
    style,
    style,
    content,
    total_variation,
    accumulated,
)
# The backward op more often: it is handed the indices that it reads by.
OPS = (
    mine_op,
    triplet_loss_op,
    *(triplet_loss_backward_op,) * 3,
    gram_op,
    gram_backward_op,
    style_op,
    style_backward_op,
)
KINDS = FUNCTIONS + OPS


def family(number: int) -> str:
    return "op" if KINDS[number % len(KINDS)] in OPS else "function"


def run(number: int) -> str:
    """What came of one call."""
    call, check = KINDS[number % len(KINDS)](Draw(number))
    try:
        result = call()
    except ERRORS as error:
        return type(error).__name__
    assert check(result), f"call {number} returned {describe(result)}"
    return "returned"


def describe(result: Any) -> Any:
    return [
        (t.dtype, tuple(t.shape)) if isinstance(t, Tensor) else t
        for t in (result if isinstance(result, tuple) else [result])
    ]


def main(numbers: range, note: str) -> None:
    """Makes the calls and prints how often each outcome came."""
    import resource

    faulthandler.enable()
    # Sizes on paper must fail at allocation, not fill the machine.
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))
    torch.set_num_threads(2)
    outcomes: collections.Counter[str] = collections.Counter()
    with open(note, "wb", buffering=0) as file:
        for number in numbers:
            os.pwrite(file.fileno(), b"%12d" % number, 0)
            outcomes[f"{family(number)} {run(number)}"] += 1
    print(json.dumps(outcomes))


def fuzz(tmp_path: Path, numbers: range) -> subprocess.CompletedProcess[str]:
    note = tmp_path / "number"
    program = f"from tests.test_fuzz import main; main({numbers!r}, {str(note)!r})"
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    if process.returncode:
        number = note.read_text().strip() if note.exists() else "none"
        pytest.fail(f"exit status {process.returncode} in call {number}:\n{process.stderr[-3000:]}")
    return process


@pytest.mark.slow
def test_ten_thousand_calls_return_or_raise(tmp_path):
    outcomes = json.loads(fuzz(tmp_path, range(CALLS)).stdout)
    assert sum(outcomes.values()) == CALLS
    # Neither mostly errors, which would test the checks alone, nor mostly good calls.
    for kind in ("function", "op"):
        total = sum(count for name, count in outcomes.items() if name.startswith(kind))
        assert 0.3 < outcomes[f"{kind} returned"] / total < 0.8
        assert {f"{kind} {error}" for error in ("TypeError", "ValueError", "RuntimeError")} <= outcomes.keys()


if __name__ == "__main__":
    print(run(int(sys.argv[1])))
