"""Every error, word for word, from the reference and from the compiled functions alike."""

from __future__ import annotations

import math
import warnings
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from deepsim_ext import _checks, functional, reference

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
FLOATS = "float32, float64, bfloat16 or float16"
DISTANCES = '"euclidean", "sqeuclidean", "cosine"'
STRATEGIES = '"hard", "easy", "semihard"'
FEATURES = f"{FLOATS} of shape [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0"
GRAM = f"{FLOATS} of shape [C, C], [1, C, C] or [B, C, C] with B=2, C=3"
NORMALIZE = 'one of "none", "hw", "chw", "bchw" or a finite number > 0'


class Case(NamedTuple):
    """`function(*args, **options)` raises `kind("function: message")`."""

    function: str
    args: tuple
    options: dict
    kind: type[Exception]
    message: str


def z(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ints(n: int, **options) -> torch.Tensor:
    return torch.arange(n, **options)


def sparse(*shape: int) -> torch.Tensor:
    return z(*shape).to_sparse()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors call themselves a prototype
    NESTED = [torch.nested.nested_tensor([z(2), z(3)], layout=k) for k in (torch.strided, torch.jagged)]
X, Y = z(4, 3), ints(4)
F, T = z(2, 3, 5), z(3, 3)


def labelled_batches(function: str) -> list[Case]:
    def wrong(args: tuple, kind: type[Exception], message: str) -> Case:
        return Case(function, args, {}, kind, message)

    embeddings = f"embeddings must be {FLOATS} of shape [N, D] with D >= 1, got "
    refs = f"ref_embeddings must be {FLOATS} of shape [M, D] with D >= 1, got "
    return [
        wrong(([[1.0]], Y), TypeError, embeddings + "list"),
        wrong((None, Y), TypeError, embeddings + "None"),
        wrong((1.5, Y), TypeError, embeddings + "float 1.5"),
        wrong((np.zeros((4, 3)), Y), TypeError, embeddings + "ndarray"),
        wrong((z(4, 3, dtype=torch.int64), Y), TypeError, embeddings + "int64 [4, 3]"),
        wrong((z(4, 3, dtype=torch.bool), Y), TypeError, embeddings + "bool [4, 3]"),
        wrong((z(4, 3, dtype=torch.complex64), Y), TypeError, embeddings + "complex64 [4, 3]"),
        wrong((z(4, 3, dtype=torch.float8_e5m2), Y), TypeError, embeddings + "float8_e5m2 [4, 3]"),
        wrong((sparse(4, 3), Y), TypeError, embeddings + "sparse_coo float32 [4, 3]"),
        *(wrong((nested, Y), TypeError, embeddings + "nested float32") for nested in NESTED),
        wrong((z(), Y), ValueError, embeddings + "float32 []"),
        wrong((z(4), Y), ValueError, embeddings + "float32 [4]"),
        wrong((z(4, 3, 1), Y), ValueError, embeddings + "float32 [4, 3, 1]"),
        wrong((z(4, 0), Y), ValueError, embeddings + "float32 [4, 0]"),
        wrong((X, [0, 1, 2, 3]), TypeError, "labels must be int64 of shape [N]=[4], got list"),
        wrong((X, Y.int()), TypeError, "labels must be int64 of shape [N]=[4], got int32 [4]"),
        wrong((X, z(4, 1)), TypeError, "labels must be int64 of shape [N]=[4], got float32 [4, 1]"),
        wrong(
            (X, z(4).requires_grad_()), TypeError, "labels must be int64 of shape [N]=[4], got float32 [4]"
        ),
        wrong((X, ints(3)), ValueError, "labels must be int64 of shape [N]=[4], got int64 [3]"),
        wrong((X, Y[:, None]), ValueError, "labels must be int64 of shape [N]=[4], got int64 [4, 1]"),
        wrong((X, torch.tensor(1)), ValueError, "labels must be int64 of shape [N]=[4], got int64 []"),
        wrong(
            (X, ints(4, device="meta")),
            ValueError,
            "labels must be on cpu, where embeddings is, got int64 [4] on meta",
        ),
        wrong((X, Y, X), ValueError, "ref_labels must be given together with ref_embeddings, got None"),
        wrong((X, Y, None, Y), ValueError, "ref_embeddings must be given together with ref_labels, got None"),
        wrong((X, Y, 0.2), TypeError, refs + "float 0.2"),  # meant to be the margin
        wrong((X, Y, [X], Y), TypeError, refs + "list"),
        wrong((X, Y, Y, Y), TypeError, refs + "int64 [4]"),
        wrong((X, Y, z(3), Y), ValueError, refs + "float32 [3]"),
        wrong(
            (X, Y, z(5, 2), ints(5)),
            ValueError,
            "ref_embeddings must be of shape [M, D]=[M, 3], got float32 [5, 2]",
        ),
        wrong(
            (X, Y, z(5, 3, dtype=F64), ints(5)),
            TypeError,
            "ref_embeddings must be float32 to match float32 embeddings, got float64 [5, 3]",
        ),
        wrong(
            (X, Y, z(5, 3, device="meta"), ints(5)),
            ValueError,
            "ref_embeddings must be on cpu, where embeddings is, got float32 [5, 3] on meta",
        ),
        wrong(
            (z(4, 3, device="meta"), ints(4, device="meta"), z(5, 3, dtype=F64, device="meta"), ints(5)),
            TypeError,
            "ref_embeddings must be float32 to match float32 embeddings, got float64 [5, 3]",
        ),
        wrong((X, Y, X, ints(3)), ValueError, "ref_labels must be int64 of shape [M]=[4], got int64 [3]"),
        wrong((X, Y, z(5, 3), z(5)), TypeError, "ref_labels must be int64 of shape [M]=[5], got float32 [5]"),
        wrong(
            (X, Y, z(5, 3), ints(5, device="meta")),
            ValueError,
            "ref_labels must be on cpu, where ref_embeddings is, got int64 [5] on meta",
        ),
    ]


def options(function: str, args: tuple, name: str, *wrong: tuple) -> list[Case]:
    """Cases of one option from (value, kind, expected, got)."""
    return [
        Case(function, args, {name: value}, kind, f"{name} must be {expected}, got {got}")
        for value, kind, expected, got in wrong
    ]


def names(function: str, args: tuple, name: str, choices: str) -> list[Case]:
    expected = f"one of {choices}"
    return options(
        function,
        args,
        name,
        ("other", ValueError, expected, '"other"'),
        ("", ValueError, expected, '""'),
        ("MEAN", ValueError, expected, '"MEAN"'),
        (None, TypeError, expected, "None"),
        (1, TypeError, expected, "int 1"),
        (["mean"], TypeError, expected, "list"),
    )


def margins(function: str, args: tuple, name: str = "margin") -> list[Case]:
    expected = "a finite number >= 0"
    return options(
        function,
        args,
        name,
        (-0.1, ValueError, expected, "float -0.1"),
        (-1, ValueError, expected, "int -1"),
        (math.nan, ValueError, expected, "float nan"),
        (math.inf, ValueError, expected, "float inf"),
        (10**400, ValueError, expected, f"int {10**400}"),
        (True, TypeError, expected, "bool True"),
        ("0.2", TypeError, expected, '"0.2"'),
        (None, TypeError, expected, "None"),
        (1j, TypeError, expected, "complex"),
        (torch.tensor(0.2), TypeError, expected, "float32 []"),
    )


def flags(function: str, args: tuple, name: str) -> list[Case]:
    expected = "True or False"
    return options(
        function,
        args,
        name,
        (1, TypeError, expected, "int 1"),
        (None, TypeError, expected, "None"),
        ("yes", TypeError, expected, '"yes"'),
    )


def normalizations(function: str, args: tuple) -> list[Case]:
    return options(
        function,
        args,
        "normalize",
        ("nchw", ValueError, NORMALIZE, '"nchw"'),
        (0, ValueError, NORMALIZE, "int 0"),
        (-2.0, ValueError, NORMALIZE, "float -2.0"),
        (math.nan, ValueError, NORMALIZE, "float nan"),
        (math.inf, ValueError, NORMALIZE, "float inf"),
        (True, TypeError, NORMALIZE, "bool True"),
        (None, TypeError, NORMALIZE, "None"),
        (torch.tensor(2.0), TypeError, NORMALIZE, "float32 []"),
    )


def layer_weights(function: str, one: tuple, two: tuple) -> list[Case]:
    sequence, number = "None or a list or tuple of finite numbers", "a finite number"

    def wrong(args: tuple, weights: object, kind: type[Exception], message: str) -> Case:
        return Case(function, args, {"weights": weights}, kind, message)

    return [
        wrong(one, 0.5, TypeError, f"weights must be {sequence}, got float 0.5"),
        wrong(one, "1", TypeError, f'weights must be {sequence}, got "1"'),
        wrong(one, torch.ones(1), TypeError, f"weights must be {sequence}, got float32 [1]"),
        wrong(one, [None], TypeError, f"weights[0] must be {number}, got None"),
        wrong(one, [True], TypeError, f"weights[0] must be {number}, got bool True"),
        wrong(two, [1, math.nan], ValueError, f"weights[1] must be {number}, got float nan"),
        wrong(two, [-math.inf, 1], ValueError, f"weights[0] must be {number}, got float -inf"),
        wrong(one, [], ValueError, "weights must be one number per layer of features (1), got 0"),
        wrong(two, (1, 2, 3), ValueError, "weights must be one number per layer of features (2), got 3"),
    ]


def layer_sequences(function: str, f: torch.Tensor, t: torch.Tensor) -> list[Case]:
    def wrong(args: tuple, kind: type[Exception], message: str) -> Case:
        return Case(function, args, {}, kind, message)

    features = "features must be a tensor or a list or tuple of tensors, got "
    return [
        wrong((None, t), TypeError, features + "None"),
        wrong(({"conv1": f}, t), TypeError, features + "dict"),
        wrong((iter([f]), [t]), TypeError, features + "list_iterator"),
        wrong((f, [t]), TypeError, "target must be a tensor, as features is, got list"),
        wrong(([f], t), TypeError, "target must be a list or tuple of 1 tensors, as features is, got "
              f"float32 {list(t.shape)}"),
        wrong(([], []), ValueError, "features must be at least one layer, got an empty sequence"),
        wrong(([f, f], [t]), ValueError, "target must be one tensor per layer of features (2), got 1"),
        wrong(
            ([f, f.to("meta")], [t, t.to("meta")]),
            ValueError,
            f"features[1] must be on cpu, where features[0] is, got float32 {list(f.shape)} on meta",
        ),
        wrong(
            (f, t.to("meta")),
            ValueError,
            f"target must be on cpu, where features is, got float32 {list(t.shape)} on meta",
        ),
    ]  # fmt: skip


def feature_maps(function: str, rest: tuple, argument: str = "features") -> list[Case]:
    def wrong(features: object, kind: type[Exception], got: str) -> Case:
        return Case(function, (features, *rest), {}, kind, f"{argument} must be {FEATURES}, got {got}")

    return [
        wrong(z(2, 3), ValueError, "float32 [2, 3]"),
        wrong(z(1, 2, 3, 4, 5, 6), ValueError, "float32 [1, 2, 3, 4, 5, 6]"),
        wrong(z(0, 3, 5), ValueError, "float32 [0, 3, 5]"),
        wrong(z(2, 0, 5), ValueError, "float32 [2, 0, 5]"),
        wrong(z(2, 3, 5, 0), ValueError, "float32 [2, 3, 5, 0]"),
        wrong(z(2, 3, 5, dtype=torch.int32), TypeError, "int32 [2, 3, 5]"),
        wrong(z(2, 3, 5, dtype=torch.complex128), TypeError, "complex128 [2, 3, 5]"),
        wrong(sparse(2, 3, 5), TypeError, "sparse_coo float32 [2, 3, 5]"),
    ]


def masks() -> list[Case]:
    """Of one layer in gram_matrix and style_loss, and of several."""
    expected = (
        f"{FLOATS} or bool of shape [*spatial], [1, *spatial] or [B, *spatial] with B=2, spatial=[4, 5]"
    )
    maps, gram = z(2, 3, 4, 5), z(3, 3)

    def wrong(mask: object, kind: type[Exception], got: str) -> list[Case]:
        message = f"mask must be {expected}, got {got}"
        return [
            Case(function, args, {"mask": mask}, kind, message)
            for function, args in (("gram_matrix", (maps,)), ("style_loss", (maps, gram)))
        ]

    def layers(mask: object, kind: type[Exception], message: str) -> Case:
        return Case("style_loss", ([maps, maps], [gram, gram]), {"mask": mask}, kind, message)

    return [
        *wrong([1.0], TypeError, "list"),
        *wrong(True, TypeError, "bool True"),
        *wrong(z(4, 5, dtype=torch.uint8), TypeError, "uint8 [4, 5]"),
        *wrong(sparse(4, 5), TypeError, "sparse_coo float32 [4, 5]"),
        *wrong(z(5, 4), ValueError, "float32 [5, 4]"),
        *wrong(z(5), ValueError, "float32 [5]"),
        *wrong(z(3, 4, 5), ValueError, "float32 [3, 4, 5]"),
        *wrong(z(2, 1, 4, 5), ValueError, "float32 [2, 1, 4, 5]"),
        *wrong(z(4, 5, dtype=torch.bool)[:, :4], ValueError, "bool [4, 4]"),
        *(
            Case(function, args, {"mask": z(4, 5, device="meta")}, ValueError,
                 "mask must be on cpu, where features is, got float32 [4, 5] on meta")
            for function, args in (("gram_matrix", (maps,)), ("style_loss", (maps, gram)))
        ),
        layers(z(4, 5), TypeError,
               "mask must be None or a list or tuple of 2 tensors or None, as features is, "
               "got float32 [4, 5]"),
        layers([z(4, 5)], ValueError, "mask must be one tensor or None per layer of features (2), got 1"),
        layers([None, z(4)], ValueError, f"mask[1] must be {expected}, got float32 [4]"),
    ]  # fmt: skip


def style_targets() -> list[Case]:
    def wrong(target: object, kind: type[Exception], message: str, features: torch.Tensor = F) -> Case:
        return Case("style_loss", (features, target), {}, kind, f"target must be {message}")

    return [
        wrong(z(3), ValueError, f"{GRAM}, got float32 [3]"),
        wrong(z(3, 4), ValueError, f"{GRAM}, got float32 [3, 4]"),
        wrong(z(4, 3), ValueError, f"{GRAM}, got float32 [4, 3]"),
        wrong(z(3, 3, 3), ValueError, f"{GRAM}, got float32 [3, 3, 3]"),
        wrong(z(0, 3, 3), ValueError, f"{GRAM}, got float32 [0, 3, 3]"),
        wrong(z(1, 2, 3, 3), ValueError, f"{GRAM}, got float32 [1, 2, 3, 3]"),
        wrong(z(3, 3, dtype=torch.int64), TypeError, f"{GRAM}, got int64 [3, 3]"),
        wrong(sparse(3, 3), TypeError, f"{GRAM}, got sparse_coo float32 [3, 3]"),
        wrong(T.double(), TypeError, "float32 to match float32 features, got float64 [3, 3]"),
        wrong(T.half(), TypeError, "float32 to match float32 features, got float16 [3, 3]"),
        wrong(T.half(), TypeError, "float32 to match bfloat16 features, got float16 [3, 3]", F.bfloat16()),
        Case("style_loss", ([F, F], [T, None]), {}, TypeError, f"target[1] must be {GRAM}, got None"),
        Case("style_loss", ([F, 1], [T, T]), {}, TypeError, f"features[1] must be {FEATURES}, got int 1"),
    ]


def content_tensors() -> list[Case]:
    def wrong(args: tuple, kind: type[Exception], message: str) -> Case:
        return Case("content_loss", args, {}, kind, message)

    return [
        wrong((z(2, 0), z(2, 0)), ValueError,
              f"features must be {FLOATS} with at least one element, got float32 [2, 0]"),
        wrong((Y, Y), TypeError, f"features must be {FLOATS} with at least one element, got int64 [4]"),
        wrong((X, X[:3]), ValueError,
              f"target must be {FLOATS} of the shape of features [4, 3], got float32 [3, 3]"),
        wrong(([X, X], [X, "x"]), TypeError,
              f'target[1] must be {FLOATS} of the shape of features[1] [4, 3], got "x"'),
        wrong((X, X.half()), TypeError,
              "target must be float32 to match float32 features, got float16 [4, 3]"),
    ]  # fmt: skip


def contrastive_tensors() -> list[Case]:
    def wrong(args: tuple, kind: type[Exception], message: str) -> Case:
        return Case("contrastive_loss", args, {}, kind, message)

    y = "y must be bool, integer or float of shape [N]=[4], got "
    return [
        wrong((z(3), X, Y), ValueError, f"x1 must be {FLOATS} of shape [N, D] with D >= 1, got float32 [3]"),
        wrong((X, None, Y), TypeError, f"x2 must be {FLOATS} of shape [N, D] with D >= 1, got None"),
        wrong((X, z(3, 3), Y), ValueError, "x2 must be of the shape of x1 [4, 3], got float32 [3, 3]"),
        wrong((X, X.double(), Y), TypeError, "x2 must be float32 to match float32 x1, got float64 [4, 3]"),
        wrong((X, X.to("meta"), Y), ValueError, "x2 must be on cpu, where x1 is, got float32 [4, 3] on meta"),
        wrong((X, X, [1, 0, 1, 0]), TypeError, y + "list"),
        wrong((X, X, z(4, dtype=torch.complex64)), TypeError, y + "complex64 [4]"),
        wrong((X, X, z(4, 1)), ValueError, y + "float32 [4, 1]"),
        wrong((X, X, z(3)), ValueError, y + "float32 [3]"),
        wrong((X, X, Y.to("meta")), ValueError, "y must be on cpu, where x1 is, got int64 [4] on meta"),
        wrong((X, X, z(4).requires_grad_()), ValueError,
              "y must be a tensor that does not require grad, got float32 [4] with requires_grad=True"),
    ]  # fmt: skip


def given_triplets() -> list[Case]:
    def wrong(args: tuple, kind: type[Exception], message: str) -> Case:
        return Case("triplet_margin_loss", args, {}, kind, message)

    rows = f"{FLOATS} of shape [T, D] with D >= 1"
    return [
        wrong((z(3), X, X), ValueError, f"anchor must be {rows}, got float32 [3]"),
        wrong((z(4, 0), X, X), ValueError, f"anchor must be {rows}, got float32 [4, 0]"),
        wrong((Y, X, X), TypeError, f"anchor must be {rows}, got int64 [4]"),
        wrong((X, None, X), TypeError, f"positive must be {rows}, got None"),
        wrong((X, X, sparse(4, 3)), TypeError, f"negative must be {rows}, got sparse_coo float32 [4, 3]"),
        wrong((X, X, z(4)), ValueError, f"negative must be {rows}, got float32 [4]"),
        wrong((X, z(3, 3), X), ValueError,
              "positive must be of the shape of anchor [4, 3], got float32 [3, 3]"),
        wrong((X, X, z(4, 2)), ValueError,
              "negative must be of the shape of anchor [4, 3], got float32 [4, 2]"),
        wrong((X, X.double(), X), TypeError,
              "positive must be float32 to match float32 anchor, got float64 [4, 3]"),
        wrong((X, X, X.half()), TypeError,
              "negative must be float32 to match float32 anchor, got float16 [4, 3]"),
        wrong((X, X.to("meta"), X), ValueError,
              "positive must be on cpu, where anchor is, got float32 [4, 3] on meta"),
        wrong((X, X, X.to("meta")), ValueError,
              "negative must be on cpu, where anchor is, got float32 [4, 3] on meta"),
    ]  # fmt: skip


def neighbors() -> list[Case]:
    def wrong(args: tuple, kind: type[Exception], message: str) -> Case:
        return Case("nearest_neighbors", args, {}, kind, message)

    queries = f"queries must be {FLOATS} of shape [Q, D] with D >= 1, got "
    gallery = f"gallery must be {FLOATS} of shape [G, D] with D >= 1, got "
    k, other, many = "k must be an integer from 1 to 1024 and at most ", z(5, 3), z(1100, 1)
    return [
        wrong((None, X, 1), TypeError, queries + "None"),
        wrong((Y, X, 1), TypeError, queries + "int64 [4]"),
        wrong((z(4), X, 1), ValueError, queries + "float32 [4]"),
        wrong((z(4, 0), None, 1), ValueError, queries + "float32 [4, 0]"),
        wrong((X, [X], 1), TypeError, gallery + "list"),
        wrong((X, z(3), 1), ValueError, gallery + "float32 [3]"),
        wrong((X, z(5, 2), 1), ValueError, "gallery must be of shape [G, D]=[G, 3], got float32 [5, 2]"),
        wrong((X, other.double(), 1), TypeError,
              "gallery must be float32 to match float32 queries, got float64 [5, 3]"),
        wrong((X, other.to("meta"), 1), ValueError,
              "gallery must be on cpu, where queries is, got float32 [5, 3] on meta"),
        wrong((X, other, 0), ValueError, k + "G=5, got int 0"),
        wrong((X, other, -1), ValueError, k + "G=5, got int -1"),
        wrong((X, other, 6), ValueError, k + "G=5, got int 6"),
        wrong((X, z(0, 3), 1), ValueError, k + "G=0, got int 1"),
        wrong((many, many + 1, 1025), ValueError, k + "G=1100, got int 1025"),
        wrong((X, X, 4), ValueError, k + "Q-1=3, got int 4"),
        wrong((X, None, 4), ValueError, k + "Q-1=3, got int 4"),
        wrong((z(0, 3), None, 1), ValueError, k + "Q-1=0, got int 1"),
        wrong((X, other, 2.0), TypeError, k + "G=5, got float 2.0"),
        wrong((X, other, True), TypeError, k + "G=5, got bool True"),
        wrong((X, other, "2"), TypeError, k + 'G=5, got "2"'),
        wrong((X, other, None), TypeError, k + "G=5, got None"),
        wrong((X, other, torch.tensor(2)), TypeError, k + "G=5, got int64 []"),
    ]  # fmt: skip


HARD, MINE = "batch_hard_triplet_loss", "batch_hard_mine"
ALL, SEMI, PAIRS = "batch_all_triplet_loss", "batch_semi_hard_triplet_loss", "batch_contrastive_loss"
BATCH = (ALL, SEMI, PAIRS)
TRIPLETS, NEIGHBORS = "triplet_margin_loss", "nearest_neighbors"
CASES = [
    *(case for function in (HARD, MINE, *BATCH) for case in labelled_batches(function)),
    *names(HARD, (X, Y), "distance", DISTANCES),
    *names(MINE, (X, Y), "distance", DISTANCES),
    *names(HARD, (X, Y), "reduction", '"mean", "mean_nonzero", "sum", "none"'),
    *(
        case
        for function in (HARD, MINE)
        for option in ("positive", "negative")
        for case in names(function, (X, Y), option, STRATEGIES)
    ),
    *(
        Case(function, (X, Y), {"positive": "semihard", "negative": "semihard"}, ValueError,
             'negative must be "hard" or "easy" with positive="semihard", got "semihard"')
        for function in (HARD, MINE)
    ),
    *margins(HARD, (X, Y)),
    *flags(HARD, (X, Y), "soft"),
    *flags(HARD, (X, Y), "return_stats"),
    *(case for function in BATCH for case in names(function, (X, Y), "distance", DISTANCES)),
    *(
        case
        for function in BATCH
        for case in names(function, (X, Y), "reduction", '"mean", "mean_nonzero", "sum"')
    ),
    *(case for function in BATCH for case in flags(function, (X, Y), "return_stats")),
    *margins(ALL, (X, Y)),
    *margins(SEMI, (X, Y)),
    *flags(SEMI, (X, Y), "soft"),
    *names(SEMI, (X, Y), "definition", '"facenet", "tfa", "pml"'),
    Case(SEMI, (X, Y), {"soft": True, "definition": "pml"}, ValueError,
         'soft must be False with definition="pml", got True'),
    *margins(PAIRS, (X, Y), "pos_margin"),
    *margins(PAIRS, (X, Y), "neg_margin"),
    *flags(PAIRS, (X, Y), "squared"),
    *given_triplets(),
    *margins(TRIPLETS, (X, X, X)),
    *flags(TRIPLETS, (X, X, X), "swap"),
    *flags(TRIPLETS, (X, X, X), "soft"),
    *names(TRIPLETS, (X, X, X), "distance", DISTANCES),
    *names(TRIPLETS, (X, X, X), "reduction", '"mean", "mean_nonzero", "sum", "none"'),
    *neighbors(),
    *names(NEIGHBORS, (X, X + 1, 2), "distance", DISTANCES),
    *contrastive_tensors(),
    *margins("contrastive_loss", (X, X, Y)),
    *names("contrastive_loss", (X, X, Y), "reduction", '"mean", "sum", "none"'),
    *feature_maps("gram_matrix", ()),
    *normalizations("gram_matrix", (F,)),
    *feature_maps("style_loss", (T,)),
    *normalizations("style_loss", (F, T)),
    *names("style_loss", (F, T), "reduction", '"mean", "sum", "gatys"'),
    *names("style_loss", (F, T), "distance", '"l2", "l1", "frobenius"'),
    *style_targets(),
    *masks(),
    *layer_sequences("style_loss", F, T),
    *layer_weights("style_loss", (F, T), ([F, F], [T, T])),
    *layer_sequences("content_loss", X, X),
    *layer_weights("content_loss", (X, X), ([X, X], [X, X])),
    *names("content_loss", (X, X), "reduction", '"mean", "sum", "gatys"'),
    *content_tensors(),
    *feature_maps("total_variation_loss", (), "image"),
    *names("total_variation_loss", (F,), "distance", '"l2", "l1"'),
    *names("total_variation_loss", (F,), "reduction", '"mean", "sum"'),
]  # fmt: skip


@pytest.mark.parametrize("module", [reference, functional], ids=["reference", "functional"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.function}: {case.message[:90]}")
def test_error(case: Case, module: ModuleType) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        getattr(module, case.function)(*case.args, **case.options)
    assert type(raised.value) is case.kind
    assert str(raised.value) == f"{case.function}: {case.message}"


def test_numbers_of_other_libraries_are_numbers() -> None:
    loss = reference.contrastive_loss(X, X, Y == 0, margin=np.float32(2), reduction="sum")
    assert loss.item() == 3 * 4
    assert reference.nearest_neighbors(X, None, np.int64(2)).indices.shape == (4, 2)


def test_a_mix_of_dtypes_is_an_error_outside_autocast_only() -> None:
    with pytest.raises(TypeError):
        reference.batch_hard_triplet_loss(X, Y, z(5, 3, dtype=BF16), ints(5))
    with torch.autocast("cpu", dtype=BF16):
        assert reference.batch_hard_triplet_loss(X, Y, z(5, 3, dtype=BF16), ints(5)).dtype == F32
        assert reference.batch_hard_triplet_loss(X, Y, z(5, 3, dtype=F64), ints(5)).dtype == F64
        halves = reference.contrastive_loss(X.half(), X.bfloat16(), Y, reduction="none")
        assert halves.dtype == F32
        options = {"margin": 1, "swap": False, "soft": False, "distance": "cosine", "reduction": "sum"}
        for mix in ((BF16, F32, F64), (F64, BF16, F32), (BF16, F64, F32)):
            rows = [X.to(dtype) for dtype in mix]
            assert {x.dtype for x in _checks.triplet_margin("loss", *rows, **options)[:3]} == {F64}
            assert reference.triplet_margin_loss(*rows).dtype == F64
        assert reference.nearest_neighbors(X, z(5, 3, dtype=F64), 1).distances.dtype == F64


@pytest.mark.parametrize("module", [reference, functional], ids=["reference", "functional"])
def test_half_features_take_targets_in_half_or_in_the_dtype_of_their_gram_matrix(module: ModuleType) -> None:
    target = torch.ones(3, 3, dtype=BF16, requires_grad=True)
    loss = module.style_loss(F.bfloat16(), target)
    assert loss.dtype == F32 and loss.item() == module.style_loss(F.bfloat16(), target.float()).item() == 1
    (grad,) = torch.autograd.grad(loss, target)
    assert grad.dtype == BF16 and grad.isfinite().all()


LOSSES = {
    "batch_hard": lambda module, x, y, f, m: module.batch_hard_triplet_loss(x, y, x + 1, y, margin=m),
    "strategies": lambda module, x, y, f, m: module.batch_hard_triplet_loss(x, y, margin=m, negative="easy"),
    "batch_all": lambda module, x, y, f, m: module.batch_all_triplet_loss(x, y, x + 1, y, margin=m),
    "semi_hard": lambda module, x, y, f, m: module.batch_semi_hard_triplet_loss(x, y, margin=m),
    "batch_contrastive": lambda module, x, y, f, m: module.batch_contrastive_loss(x, y, neg_margin=m),
    "triplet_margin": lambda module, x, y, f, m: module.triplet_margin_loss(x, x + 1, x, margin=m, swap=True),
    "neighbors": lambda module, x, y, f, m: module.nearest_neighbors(x, None, 3).distances,
    "contrastive": lambda module, x, y, f, m: module.contrastive_loss(x, x + 1, y, margin=m),
    "style": lambda module, x, y, f, m: module.style_loss([f, f], [T, T], weights=[m, 1], reduction="gatys"),
    "content": lambda module, x, y, f, m: module.content_loss([f, f], [f, f], weights=[m, 1]),
    "gram": lambda module, x, y, f, m: module.gram_matrix(f, normalize="bchw"),
    "masks": lambda module, x, y, f, m: module.style_loss(
        [f, f], [T, T], weights=[m, 1], mask=[f[:, 0], None]
    ),
    "total_variation": lambda module, x, y, f, m: module.total_variation_loss(f * m, distance="l1"),
}


def count_graphs(module: ModuleType, name: str, margins: tuple[float, ...]) -> int:
    """Compiled graphs that one call per margin takes, each call at a size of its own."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend=backend)
    for n, margin in zip((5, 7, 8), margins, strict=True):
        compiled(module, z(n, 3), ints(n), z(2, 3, n, n + 1), margin)
    return len(graphs)


@pytest.mark.parametrize("module", [reference, functional], ids=["reference", "functional"])
@pytest.mark.parametrize("name", LOSSES)
def test_new_sizes_need_no_new_graph(name: str, module: ModuleType) -> None:
    assert count_graphs(module, name, (0.25, 0.25, 0.25)) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_checks_need_no_new_graph_for_new_numbers(name: str) -> None:
    assert count_graphs(reference, name, (0.25, 0.5, 2.5)) == 1
