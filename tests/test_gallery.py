"""Galleries against sorting all distances in float64, and one backend against the other."""

from __future__ import annotations

import math

import pytest
import torch

from deepsim_ext._nearest_rows import nearest_rows
from deepsim_ext.recognition import Gallery, faiss_search
from deepsim_ext.recognition import gallery as module
from deepsim_ext.recognition.faiss_search import FaissSearch
from deepsim_ext.reference.distances import pairwise

from .samples import DISTANCES, DTYPES

NAN = math.nan

by_distance = pytest.mark.parametrize("distance", DISTANCES)
by_backend = pytest.mark.parametrize("backend", ["exact", "faiss"])


def names_of(numbers) -> list[str]:
    return [f"person {int(i)}" for i in numbers]


def filled(embeddings, names, **options) -> Gallery:
    gallery = Gallery(embeddings.shape[1], dtype=embeddings.dtype, **options)
    gallery.enroll(names, embeddings)
    return gallery


def expected(embeddings, names, queries, k, distance):
    """Names and float64 distances of the k nearest identities, by the definition."""
    d = pairwise(queries.double(), embeddings.double(), distance)
    identities = list(dict.fromkeys(names))
    rows = [torch.tensor([n == identity for n in names]) for identity in identities]
    nearest = torch.stack([d[:, of].amin(dim=1) for of in rows], dim=1)
    distances, order = nearest.sort(dim=1, stable=True)
    return [[identities[i] for i in row[:k]] for row in order.tolist()], distances[:, :k]


# ---- what is found -----------------------------------------------------------------------------------------


@by_backend
@by_distance
@pytest.mark.parametrize("k", [1, 4, 30])
def test_finds_the_nearest_identities(k, distance, backend):
    embeddings, queries = torch.randn(150, 6).double(), torch.randn(70, 6).double()
    names = names_of(torch.randint(30, (150,)))  # 1 to about ten templates each
    assert len(set(names)) == 30
    found = filled(embeddings, names, distance=distance, backend=backend).identify(queries, k)
    identities, distances = expected(embeddings, names, queries, k, distance)
    assert found.identities == identities
    torch.testing.assert_close(found.distances, distances, rtol=1e-12, atol=1e-15)
    assert (found.distances.diff(dim=1) >= 0).all()


@by_backend
def test_one_identity_with_many_templates_does_not_hide_the_others(backend):
    crowd = torch.randn(2500, 3, dtype=torch.float64) * 0.01
    others = torch.randn(20, 3, dtype=torch.float64) + 5
    embeddings, names = torch.cat([crowd, others]), ["crowd"] * 2500 + names_of(range(20))
    queries = torch.randn(9, 3, dtype=torch.float64) * 0.1
    found = filled(embeddings, names, backend=backend).identify(queries, 4)
    assert found.identities == expected(embeddings, names, queries, 4, "euclidean")[0]
    assert all(row[0] == "crowd" for row in found.identities)


def hard_sets():
    """Name, gallery and queries on which a search in float32, by products, takes the wrong rows."""
    g = torch.Generator().manual_seed(11)
    x, q = torch.randn(200, 24, generator=g), torch.randn(24, 24, generator=g)
    yield "offset", x * 0.1 + 1000, q * 0.1 + 1000
    yield "two_places", x + torch.arange(200)[:, None] % 2 * 1e4, q + 1e4
    yield "duplicates", x[:9].repeat(22, 1), q
    grid = torch.randint(3, (200, 3), generator=g).float()
    yield "grid", grid, torch.randint(3, (24, 3), generator=g).float()
    yield "all_the_same", torch.ones(200, 3), torch.randint(2, (24, 3), generator=g).float()
    yield "zero_rows", x * (torch.arange(200) % 3 > 0)[:, None], q * (torch.arange(24) % 2)[:, None]
    yield "huge", x * 1e17, q * 1e17
    yield "tiny", x * 1e-15, q * 1e-15
    yield "far_queries", x, q * 1e17
    yield "close_to_the_limit", x * 1e-17, q * 1e17 / q.norm(dim=1, keepdim=True)
    yield "doubles", x.double() * 1e100 + 1e102, q.double() * 1e100 + 1e102
    yield "nearly_ties", 1 + x.double() * 1e-9, 1 + q.double() * 1e-9


@by_distance
def test_both_backends_answer_the_same(distance):
    for name, embeddings, queries in hard_sets():
        names = names_of(torch.arange(len(embeddings)) % 70)
        for k in (1, 5):
            found = FaissSearch(embeddings, distance)(queries, k)
            assert torch.equal(found.indices, nearest_rows(queries, embeddings, k, distance=distance).indices)
            answers = [
                filled(embeddings, names, distance=distance, backend=backend).search(queries, k)
                for backend in ("exact", "faiss")
            ]
            assert torch.equal(answers[0].indices, answers[1].indices), (name, k)
            torch.testing.assert_close(answers[0].distances, answers[1].distances, rtol=1e-6, atol=0)


def test_a_query_for_which_faiss_finds_nobody():
    rows = torch.randn(200, 24) * 1e-17
    queries = rows[-24:].clone()
    queries[0] = 1e17  # squared, and in units of the gallery, beyond float32
    found = FaissSearch(rows, "euclidean")(queries, 1)
    assert (found.indices >= 0).all()


def test_faiss_decides_most_queries_itself(monkeypatch):
    asked = []

    def counted(queries, gallery, k, **options):
        if len(gallery) == 3000:
            asked.append(len(queries))
        return nearest_rows(queries, gallery, k, **options)

    monkeypatch.setattr(faiss_search, "nearest_rows", counted)
    for distance in DISTANCES:
        far = 0 if distance == "cosine" else 1e4
        FaissSearch(torch.randn(3000, 64) + far, distance)(torch.randn(200, 64) + far, 5)
    assert sum(asked) < 30


@by_backend
@by_distance
def test_equal_distances_go_to_the_identity_that_was_enrolled_first(distance, backend):
    gallery = Gallery(2, distance=distance, backend=backend)
    gallery.enroll("other", torch.tensor([0.0, -1.0]))
    gallery.enroll("b", torch.tensor([-1.0, 1.0]))
    gallery.enroll("a", torch.tensor([1.0, 1.0]))
    gallery.enroll("other", torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    found = gallery.identify(torch.tensor([[0.0, 2.0]]), 3)
    assert found.identities == [["other", "b", "a"]]
    assert found.distances.unique().numel() == 1


def test_a_tie_at_the_last_place_goes_to_the_lowest_row():
    """Tiles, which are around the gallery's mean, would choose among these by rounding errors."""
    for _ in range(10):
        query, offsets = torch.randint(-(2**20), 2**20, (1, 20)) / 2**20, torch.randint(-9, 9, (20,)) / 8
        tied = torch.stack([query[0] + offsets[torch.randperm(20)] for _ in range(90)])
        rows = torch.cat([tied, 3 + torch.rand(9, 20)])
        gallery = filled(rows, names_of(range(99)), backend="exact")
        for k in (1, 30):
            assert gallery.identify(query, k).identities == [names_of(range(k))]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes(dtype):
    stored = torch.float64 if dtype is torch.float64 else torch.float32
    gallery = Gallery(8, dtype=stored)
    embeddings, queries = torch.randn(30, 8).to(dtype), torch.randn(9, 8).to(dtype)
    gallery.enroll(names_of(range(30)), embeddings)
    found = gallery.identify(queries, 2)
    assert found.distances.dtype is stored
    assert found.identities == expected(embeddings, names_of(range(30)), queries, 2, "euclidean")[0]


def test_a_threshold_is_what_distances_have_to_be_less_than():
    gallery = filled(torch.tensor([[0.0], [3.0]]), ["a", "b"], threshold=2)
    found = gallery.identify(torch.tensor([[1.0], [2.0], [-2.0], [9.0]]), 2)
    assert found.identities == [["a", None], ["b", None], [None, None], [None, None]]
    assert found.distances.tolist() == [[1, 2], [1, 2], [2, 5], [6, 9]]
    gallery.threshold = None
    assert gallery.identify(torch.tensor([[9.0]])).identities == [["b"]]
    with pytest.raises(ValueError, match="^Gallery: threshold must be a finite number >= 0, got float -1.0"):
        gallery.threshold = -1.0
    assert gallery.threshold is None


@by_backend
def test_fewer_identities_than_k(backend):
    gallery = Gallery(2, backend=backend)
    query = torch.tensor([1.0, 0.0])
    assert gallery.identify(query, 2) == ([[None, None]], pytest.approx(torch.full((1, 2), math.inf)))
    assert gallery.search(query[None], 1).indices.tolist() == [[-1]]
    gallery.enroll("a", torch.zeros(2))
    found = gallery.identify(query, 3)
    assert found.identities == [["a", None, None]]
    assert found.distances.tolist() == [[1, math.inf, math.inf]]
    none = gallery.identify(torch.empty(0, 2), 2)
    assert none.identities == [] and none.distances.shape == (0, 2)


def test_verify_looks_at_one_identity():
    embeddings, names = torch.randn(40, 5), names_of(torch.arange(40) % 7)
    gallery = filled(embeddings, names, distance="cosine", threshold=0.4)
    queries = torch.randn(50, 5)
    for identity in gallery.identities:
        of = torch.tensor([name == identity for name in names])
        exact = 1 - torch.cosine_similarity(queries.double()[:, None], embeddings.double()[None, of], dim=2)
        found = gallery.verify(identity, queries)
        torch.testing.assert_close(found.distances.double(), exact.amin(dim=1), rtol=1e-5, atol=1e-6)
        assert torch.equal(found.same, found.distances < 0.4)
    assert found.same.any() and not found.same.all()
    assert gallery.verify(names[0], embeddings[0]).same.tolist() == [True]


# ---- enrolling and removing --------------------------------------------------------------------------------


@by_backend
def test_enrolling_and_removing_is_as_if_it_had_always_been_so(backend):
    g = torch.Generator().manual_seed(4)
    gallery, kept = Gallery(4, backend=backend), {}
    queries = torch.randn(6, 4, generator=g)
    for step in range(60):
        name = f"person {int(torch.randint(8, (1,), generator=g))}"
        if name in gallery and torch.rand(1, generator=g) < 0.4:
            gallery.remove(name)
            del kept[name]
        else:
            rows = torch.randn(int(torch.randint(1, 4, (1,), generator=g)), 4, generator=g)
            gallery.enroll(name, rows)
            kept[name] = torch.cat([kept.get(name, rows[:0]), rows])
            rows.zero_()  # the gallery has copies
        assert gallery.identities == list(kept) and len(gallery) == len(kept)
        assert gallery.template_count == sum(map(len, kept.values()))
        if step % 5 == 0:
            fresh = Gallery(4)
            for identity, templates in kept.items():
                fresh.enroll(identity, templates)
                assert torch.equal(gallery.templates(identity), templates)
            assert gallery.identify(queries, 3).identities == fresh.identify(queries, 3).identities
    gallery.templates(identity).zero_()  # a copy as well
    assert gallery.templates(identity).any()


def test_a_name_that_comes_back_is_enrolled_last():
    gallery = filled(torch.zeros(3, 1), ["a", "b", "c"])
    gallery.remove("a")
    gallery.enroll("a", torch.zeros(1))
    assert gallery.identities == ["b", "c", "a"] and "a" in gallery and "d" not in gallery
    assert gallery.identify(torch.zeros(1), 3).identities == [["b", "c", "a"]]


@pytest.mark.parametrize(
    ("identity", "embeddings", "kind", "text"),
    [
        ("", torch.zeros(2), ValueError, 'identity must be a str of at least one character, got ""'),
        (7, torch.zeros(2), TypeError, "identity must be a str of at least one character, got int 7"),
        ("\ud800", torch.zeros(2), ValueError, r"identity must be a str without surrogates, got '\ud800'"),
        (
            ["a", ""],
            torch.zeros(2, 2),
            ValueError,
            'identity must be a str of at least one character, got ""',
        ),
        (["a"], torch.zeros(2, 2), ValueError, "identity must be one per row (2), got 1"),
        ("a", torch.zeros(0, 2), ValueError, "embeddings must be of at least one row, got none"),
        (
            "a",
            torch.tensor([1, NAN]),
            ValueError,
            "must be finite, with rows shorter than 1e+18, got a NaN or inf",
        ),
        ("a", torch.tensor([[0, 1], [math.inf, 1]]), ValueError, "than 1e+18, got a NaN or inf"),
        ("a", torch.tensor([0, 2e18]), ValueError, "than 1e+18, got a longer one"),
        (
            "a",
            torch.zeros(3, 3),
            ValueError,
            "float32 or bfloat16 or float16 of shape [K, D]=[K, 2] or [D], got float32 [3, 3]",
        ),
        ("a", torch.zeros(2).double(), TypeError, "of shape [K, D]=[K, 2] or [D], got float64 [2]"),
        ("a", [0.0, 1.0], TypeError, "or [D], got list"),
    ],
)
def test_a_failing_enrolment_changes_nothing(identity, embeddings, kind, text):
    gallery = filled(torch.ones(1, 2), ["b"])
    with pytest.raises(kind) as raised:
        gallery.enroll(identity, embeddings)
    assert str(raised.value).startswith("enroll: ") and str(raised.value).endswith(text)
    assert gallery.identities == ["b"] and gallery.template_count == 1


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda g: g.identify(torch.zeros(1, 2), 0),
            ValueError,
            "search: k must be an integer >= 1, got int 0",
        ),
        (
            lambda g: g.identify(torch.zeros(1, 2), 1.0),
            TypeError,
            "search: k must be an integer >= 1, got float 1.0",
        ),
        (
            lambda g: g.identify(torch.tensor([[0, 0], [NAN, 0]])),
            ValueError,
            "search: queries must be finite, with rows shorter than 1e+18, got a NaN or inf",
        ),
        (
            lambda g: g.identify(torch.zeros(1, 3)),
            ValueError,
            "search: queries must be float32 or bfloat16 or float16 of shape [Q, D]=[Q, 2] or [D],"
            " got float32 [1, 3]",
        ),
        (lambda g: g.remove("x"), ValueError, 'remove: identity must be in the gallery, got "x"'),
        (lambda g: g.templates("x"), ValueError, 'templates: identity must be in the gallery, got "x"'),
        (
            lambda g: g.verify("b", torch.zeros(2)),
            ValueError,
            "verify: threshold of the gallery must be a number, got None",
        ),
        (lambda g: Gallery(0), ValueError, "Gallery: embedding_size must be an integer >= 1, got int 0"),
        (
            lambda g: Gallery(2, distance="l2"),
            ValueError,
            'Gallery: distance must be one of "euclidean", "sqeuclidean", "cosine", got "l2"',
        ),
        (
            lambda g: Gallery(2, backend="gpu"),
            ValueError,
            'Gallery: backend must be one of "auto", "exact", "faiss", got "gpu"',
        ),
        (
            lambda g: Gallery(2, dtype=torch.float16),
            ValueError,
            "Gallery: dtype must be torch.float32 or torch.float64, got float16",
        ),
        (lambda g: Gallery(2, dtype="float32"), TypeError, 'torch.float32 or torch.float64, got "float32"'),
        (lambda g: Gallery(2, threshold=NAN), ValueError, "finite number >= 0, got float nan"),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind) as raised:
        call(filled(torch.ones(1, 2), ["b"]))
    assert str(raised.value).endswith(text)


# ---- which backend -----------------------------------------------------------------------------------------


def test_auto_takes_faiss_for_few_queries_of_a_large_gallery(monkeypatch):
    used = []
    monkeypatch.setattr(module, "FaissSearch", lambda *a: used.append("faiss") or FaissSearch(*a))
    monkeypatch.setattr(module, "FAISS_TEMPLATES", 50)
    gallery = filled(torch.randn(49, 3), names_of(range(49)))
    gallery.identify(torch.randn(16, 3))
    assert not used
    gallery.enroll("last", torch.randn(3))
    gallery.identify(torch.randn(17, 3))
    assert not used
    for _ in range(2):
        gallery.identify(torch.randn(16, 3))
    assert used == ["faiss"]  # one index for both
    gallery.enroll("another", torch.full((3,), 100.0))
    assert gallery.identify(torch.full((3,), 100.0)).identities == [["another"]]
    gallery.remove("another")
    assert gallery.identify(torch.full((3,), 100.0)).identities != [["another"]]
    assert used == ["faiss"] * 3


def test_without_faiss(monkeypatch):
    monkeypatch.setattr(faiss_search.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "FAISS_TEMPLATES", 1)
    gallery = filled(torch.zeros(3, 1), ["a", "b", "c"])
    assert gallery.identify(torch.zeros(1)).identities == [["a"]]
    with pytest.raises(
        ImportError, match=r"^Gallery: faiss not installed; pip install deepsim-ext\[gallery\]$"
    ):
        Gallery(2, backend="faiss")
