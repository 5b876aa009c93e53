"""Semi-hard negatives of a block, for given lists of positives: brute force, plain torch, every contract."""

from __future__ import annotations

import importlib
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from deepsim_ext import reference
from deepsim_ext.reference import given_lists
from deepsim_ext.reference.distances import rowwise
from deepsim_ext.semi_hard_negatives import semi_hard_negatives

from .samples import DISTANCES, DTYPES

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
by_distance = pytest.mark.parametrize("distance", DISTANCES)


class Block(NamedTuple):
    """What both ops over given lists take, but for their options."""

    embeddings: Tensor
    labels: Tensor
    ref_embeddings: Tensor
    ref_labels: Tensor
    begin: Tensor
    positives: Tensor

    def of(self, rows: slice) -> Block:
        """With some of the block's rows."""
        return self._replace(ref_embeddings=self.ref_embeddings[rows], ref_labels=self.ref_labels[rows])


def block(
    n: int, m: int, depth: int, classes: int, longest: int, dtype=torch.float64, seed: int = 0
) -> Block:
    """Lists of up to `longest` distances between 0 and the largest, some of them empty, in no order."""
    g = torch.Generator().manual_seed(seed)
    x, refs = (torch.randn(k, depth, generator=g, dtype=torch.float64) + 1 for k in (n, m))
    lengths = torch.randint(longest + 1, (n,), generator=g)
    begin = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    positives = 1.5 * (2 * depth) ** 0.5 * torch.rand(int(begin[-1]), generator=g, dtype=torch.float64)
    labels, ref_labels = (torch.randint(classes, (k,), generator=g) for k in (n, m))
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    return Block(x.to(dtype), labels, refs.to(dtype), ref_labels, begin, positives.to(compute))


def blocks(dtype=torch.float64) -> dict[str, Block]:
    ragged = block(133, 190, 40, 12, 9, dtype)
    strided = block(60, 70, 9, 4, 5, dtype)
    return {
        "ragged": ragged,
        "searched lists": block(70, 97, 24, 5, 200, dtype),
        "scanned and searched": block(100, 65, 5, 60, 48, dtype, seed=2),
        "many": block(200, 251, 130, 30, 20, dtype),
        "one row": block(1, 1, 3, 5, 4, dtype, seed=3),
        "no anchors": block(0, 20, 3, 2, 4, dtype),
        "no block": block(20, 0, 3, 2, 4, dtype),
        "no positives": block(20, 31, 3, 2, 0, dtype),
        "no negatives": block(20, 31, 3, 1, 4, dtype),
        "zero rows": ragged._replace(
            embeddings=ragged.embeddings * (torch.arange(133) % 3 > 0)[:, None],
            ref_embeddings=ragged.ref_embeddings * (torch.arange(190) % 4 > 0)[:, None],
        ),
        "far from the origin": ragged._replace(
            embeddings=ragged.embeddings + 10, ref_embeddings=ragged.ref_embeddings + 10
        ),
        "strided": strided._replace(
            embeddings=strided.embeddings.T.contiguous().T,
            ref_embeddings=strided.ref_embeddings.repeat(1, 2)[:, :9],
            begin=strided.begin.repeat_interleave(2)[::2],
            positives=strided.positives.repeat_interleave(2)[::2],
        ),
        "limits": ragged._replace(positives=ragged.positives.clone().fill_(-1)),
        "unreachable": ragged._replace(positives=ragged.positives.clone().fill_(math.inf)),
    }


def scaled(b: Block, distance: str) -> Block:
    """The same with positives in the units of the distance."""
    if distance == "euclidean":
        return b
    finite = b.positives.isfinite() & (b.positives > 0)
    squares = b.positives.square() / (40 if distance == "cosine" else 1)
    return b._replace(positives=torch.where(finite, squares, b.positives))


def exact_distances(b: Block, distance: str) -> tuple[Tensor, Tensor]:
    """float64 [N, M] distances and which of them are to a row of another label."""
    d = rowwise(b.embeddings.double()[:, None], b.ref_embeddings.double()[None], distance)
    return d, b.labels[:, None] != b.ref_labels


def nearest_beyond(d: Tensor, limit: float) -> tuple[float, int]:
    return min(((v, j) for j, v in enumerate(d.tolist()) if v > limit), default=(math.inf, -1))


@by_dtype
@by_distance
def test_values_match_brute_force(distance, dtype):
    for name, b in blocks(dtype).items():
        b = scaled(b, distance)
        d, negative = exact_distances(b, distance)
        nearest, nearest_index, farthest, farthest_index = semi_hard_negatives(*b, distance=distance)
        assert nearest.dtype == farthest.dtype == b.positives.dtype
        assert nearest_index.dtype == farthest_index.dtype == torch.int32
        rounding = 1e-12 if dtype is torch.float64 else 2e-5
        tolerance = rounding * (d.max().item() if d.numel() else 1.0)
        for a in range(len(d)):
            own = torch.where(negative[a], d[a], -math.inf)
            if negative[a].any():
                assert abs(farthest[a] - own.max()) <= tolerance, name
                assert abs(own[farthest_index[a]] - own.max()) <= 2 * tolerance, name
            else:
                assert farthest[a] == -math.inf and farthest_index[a] == -1, name
            for t in range(int(b.begin[a]), int(b.begin[a + 1])):
                # Of rows within rounding of the positive either side may be taken.
                limit, got, row = b.positives[t].item(), nearest[t].item(), nearest_index[t].item()
                low, _ = nearest_beyond(own, max(limit - tolerance, -2.0))
                high, expected = nearest_beyond(own, limit + tolerance)
                assert low - tolerance <= got <= high + tolerance, name
                assert (got == math.inf) == (row == -1), name
                if row >= 0:
                    assert abs(own[row] - got) <= tolerance, name
                if dtype is torch.float64:
                    assert row == expected, name


def rounded_roots(squares: torch.Tensor) -> torch.Tensor:
    """Square roots as IEEE 754 has them. torch.sqrt leaves some an ulp off where MKL has a quicker way."""
    return torch.from_numpy(np.sqrt(squares.clamp(min=0).numpy()))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean"])
def test_rows_of_whole_numbers_tie_exactly(distance, dtype):
    """Points of a grid: many distances are equal to each other and to positives, and the first row wins."""
    g = torch.Generator().manual_seed(3)
    b = block(130, 170, 2, 5, 70, dtype)
    x, refs = (torch.randint(-3, 4, (k, 2), generator=g).to(dtype) + 50 for k in (130, 170))
    squares = torch.randint(-1, 40, b.positives.shape, generator=g).to(b.positives)
    limits = torch.where(squares < 0, squares, rounded_roots(squares)) if distance == "euclidean" else squares
    b = b._replace(embeddings=x, ref_embeddings=refs, positives=limits)
    d, negative = exact_distances(b, "sqeuclidean")
    d = rounded_roots(d) if distance == "euclidean" else d
    d = torch.where(negative, d.to(dtype), -math.inf)
    nearest, nearest_index, farthest, farthest_index = semi_hard_negatives(*b, distance=distance)
    assert torch.equal(farthest, d.amax(dim=1)) and torch.equal(farthest_index.long(), d.argmax(dim=1))
    for a in range(130):
        for t in range(int(b.begin[a]), int(b.begin[a + 1])):
            assert (nearest[t], nearest_index[t]) == nearest_beyond(d[a], b.positives[t].item())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
@by_distance
def test_the_best_of_several_blocks_is_the_best_of_all(distance, dtype):
    """To the last bit, with a centre that all blocks share: which does not depend on who is in a block."""
    for name, b in blocks(dtype).items():
        b = scaled(b, distance)
        center = b.ref_embeddings.double().mean(dim=0).nan_to_num()
        if distance == "cosine":
            center = torch.zeros_like(center) if name == "zero rows" else 0.3 * center
        whole = semi_hard_negatives(*b, center=center, distance=distance)
        cuts = [0, len(b.ref_labels) // 5, len(b.ref_labels) // 2, len(b.ref_labels)]
        parts = [
            (start, semi_hard_negatives(*b.of(slice(start, end)), center=center, distance=distance))
            for start, end in zip(cuts, cuts[1:], strict=False)
        ]
        for value, sign in ((0, 1), (2, -1)):
            best = torch.stack([sign * part[value] for _, part in parts]).min(dim=0)
            rows = torch.stack([part[value + 1] + (part[value + 1] >= 0) * start for start, part in parts])
            assert torch.equal(sign * best.values, whole[value]), name
            assert torch.equal(rows.gather(0, best.indices[None])[0], whole[value + 1].long()), name


@by_dtype
@by_distance
def test_plain_torch_finds_the_same_in_stripes(distance, dtype, monkeypatch):
    monkeypatch.setattr(given_lists, "WORKSPACE", 1000)
    for name, b in blocks(dtype).items():
        b = scaled(b, distance)
        got = semi_hard_negatives(*b, distance=distance)
        plain = reference.semi_hard_negatives(*b, None, distance)
        for x, y in zip(got, plain, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape
        if dtype is torch.float64:
            assert torch.equal(got[1], plain[1]) and torch.equal(got[3], plain[3]), name
            torch.testing.assert_close(got[0], plain[0], rtol=1e-12, atol=1e-12)
        else:  # where rounding decides, a row is another: not often
            assert (got[1] == plain[1]).double().mean() > 0.98 or not len(b.positives), name
        torch.testing.assert_close(got[2], plain[2], rtol=2e-5, atol=1e-5)


@by_distance
@pytest.mark.parametrize("search", ["compiled", "plain"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
def test_what_cannot_be_compared_is_nan(bad, search, distance):
    def call(b):
        if search == "plain":
            return reference.semi_hard_negatives(*b, None, distance)
        return semi_hard_negatives(*b, distance=distance)

    b = scaled(block(40, 50, 6, 5, 6, torch.float32), distance)
    for argument in ("embeddings", "ref_embeddings", "positives"):
        wrong = getattr(b, argument).clone()
        wrong[17] = bad
        result = call(b._replace(**{argument: wrong}))
        if argument == "positives" and not math.isnan(bad):
            assert result[0][17] == math.inf and result[1][17] == -1 and (result[3] >= 0).all()
        elif bad == 1e20 and distance == "cosine":
            assert result[2].isfinite().all()
        else:
            assert result[0].isnan().all() and result[2].isnan().all()
            assert (result[1] == -1).all() and (result[3] == -1).all()


def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    for b in (block(300, 700, 30, 9, 20, torch.float32), block(200, 300, 8, 3, 90, torch.float32)):
        found = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(semi_hard_negatives(*b))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(dtype):
    op = torch.ops.deepsim_ext.semi_hard_negatives.default
    opcheck(op, (*block(9, 12, 4, 3, 5, dtype), None, "cosine"))
    opcheck(op, (*block(9, 0, 4, 3, 5, dtype), torch.zeros(4, dtype=torch.float64), "euclidean"))


def test_plain_torch_is_the_kernel_of_other_devices():
    for op in ("positive_distances", "semi_hard_negatives", "batch_all_negatives"):
        importlib.import_module(f"deepsim_ext.{op}")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"deepsim_ext::{op}", "CUDA")


def refusals(b: Block) -> list[tuple[type[Exception], str, Block]]:
    """Arguments that either op must not read, with what it says."""
    begin = r"begin must ascend from 0 to the number of positives"
    wrong = [
        (TypeError, "embeddings must be float32", {"embeddings": b.embeddings.long()}),
        (ValueError, r"labels must be of shape \[20\]", {"labels": b.labels[1:]}),
        (ValueError, r"ref_labels must be of shape \[30\]", {"ref_labels": b.ref_labels[1:]}),
        (ValueError, "ref_embeddings must be of shape", {"ref_embeddings": b.ref_embeddings[:, 1:]}),
        (TypeError, "ref_embeddings must be", {"ref_embeddings": b.ref_embeddings.double()}),
        (TypeError, "positives must be Float", {"positives": b.positives.double()}),
        (ValueError, "positives must have 1 dimensions", {"positives": b.positives[None]}),
        (TypeError, "begin must be Long", {"begin": b.begin.int()}),
        (ValueError, r"begin must be of shape \[21\]", {"begin": b.begin[1:]}),
        (ValueError, begin, {"begin": b.begin + 1}),
        (ValueError, begin, {"begin": b.begin - 1}),
        (ValueError, begin, {"begin": b.begin.flip(0)}),
        (ValueError, begin, {"positives": b.positives[1:]}),
    ]
    for values in ((5, 2**62), (7, -(2**62)), (9, int(b.begin[-1]) + 1)):
        changed = b.begin.clone()
        changed[values[0]] = values[1]
        wrong.append((ValueError, begin, {"begin": changed}))
    return [(kind, words, b._replace(**change)) for kind, words, change in wrong]


def test_arguments_that_do_not_go_together_are_refused():
    b = block(20, 30, 4, 3, 5, torch.float32)
    for kind, words, wrong in refusals(b):
        with pytest.raises(kind, match=f"semi_hard_negatives: {words}"):
            semi_hard_negatives(*wrong)
    for kind, center in (
        (ValueError, torch.zeros(3, dtype=torch.float64)),
        (TypeError, torch.zeros(4)),
    ):
        with pytest.raises(kind, match="center must be"):
            semi_hard_negatives(*b, center=center)
    with pytest.raises(ValueError, match="distance must be one of"):
        semi_hard_negatives(*b, distance="l2")
