"""Pairs: their distances, pairs drawn from labels, and the files that pairs and embeddings come in."""

from __future__ import annotations

import io
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepsim_ext.verification import (
    all_pairs,
    balanced_pairs,
    hardest_pairs,
    kfold_accuracy,
    lfw_files,
    load_embeddings,
    load_labels,
    pair_distances,
    pairs,
    read_lfw_pairs,
    read_pairs,
)

DISTANCES = ("sqeuclidean", "euclidean", "cosine")


def by_hand(a: np.ndarray, b: np.ndarray, distance: str) -> float:
    if distance == "cosine":
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return 1.0 if norms == 0 else 1 - a @ b / norms
    squared = float(((a - b) ** 2).sum())
    return squared if distance == "sqeuclidean" else squared**0.5


# ---- distances ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("chunk_bytes", [1, 200, 2**22])
def test_distances_of_pairs(distance, chunk_bytes, monkeypatch):
    monkeypatch.setattr(pairs, "CHUNK_BYTES", chunk_bytes)
    x = torch.randn(20, 6, dtype=torch.float64)
    x[3] = 0
    indices = torch.randint(20, (57, 2))
    expected = [by_hand(*x[pair].numpy(), distance) for pair in indices]
    found = pair_distances(x, indices, distance=distance)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    from_array = pair_distances(x.numpy(), indices.numpy().astype(np.int32), distance=distance)
    assert isinstance(from_array, np.ndarray) and np.array_equal(from_array, found.numpy())


def test_distances_do_not_cancel_and_halves_are_computed_in_float32():
    x = torch.tensor([[1000.0, 1.0], [1000.0, 1.001]])
    far_apart = pair_distances(x, torch.tensor([[0, 1]]))
    assert far_apart.dtype == torch.float32
    assert far_apart.item() == pytest.approx(float(x[1, 1] - x[0, 1]) ** 2, rel=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        half = (torch.randn(5, 3) * 300).to(dtype)
        found = pair_distances(half, torch.tensor([[0, 1], [2, 4]]))
        assert torch.equal(found, pair_distances(half.float(), torch.tensor([[0, 1], [2, 4]])))
    array = np.array([[300.0], [-300.0]], np.float16)
    assert pair_distances(array, np.array([[0, 1]])).tolist() == [360000.0]  # beyond float16


def test_no_pairs_have_no_distances():
    for x in (torch.randn(3, 2), np.zeros((3, 2), np.float64)):
        found = pair_distances(x, np.empty((0, 2), int))
        assert type(found) is type(x) and found.shape == (0,) and found.dtype == x.dtype


def test_distances_have_no_gradient():
    assert not pair_distances(torch.randn(3, 2, requires_grad=True), torch.tensor([[0, 1]])).requires_grad


def test_the_usual_layout_of_pairs():
    x = torch.randn(8, 3)
    found = pair_distances(x, np.arange(8).reshape(-1, 2))
    torch.testing.assert_close(found, (x[0::2] - x[1::2]).square().sum(1))


def test_errors_of_pair_distances_word_for_word():
    x = torch.zeros(3, 2)
    nan = x.clone()
    nan[1, 0] = float("nan")
    embeddings = "a tensor or array, float32, float64, bfloat16 or float16 of shape [N, D] with D >= 1"
    integers = "a tensor or array of integers of shape [P, 2]"
    i = np.array([[0, 2], [0, 1]])
    for arguments, kind, text in [
        ((x.long(), i), TypeError, f"embeddings must be {embeddings}, got int64 [3, 2]"),
        ((x[0], i), ValueError, f"embeddings must be {embeddings}, got float32 [2]"),
        ((x.numpy().astype(">f4"), i), TypeError, f"embeddings must be {embeddings}, got >f4 [3, 2]"),
        ((x.tolist(), i), TypeError, f"embeddings must be {embeddings}, got list"),
        ((x, i.astype(float)), TypeError, f"pairs must be {integers}, got float64 [2, 2]"),
        ((x, i.astype(np.uint64)), TypeError, f"pairs must be {integers}, got uint64 [2, 2]"),
        ((x, i == 0), TypeError, f"pairs must be {integers}, got bool [2, 2]"),
        ((x, i.T[:1].T), ValueError, f"pairs must be {integers}, got int64 [2, 1]"),
        (
            (x, i + 1),
            ValueError,
            "pairs must be indices of the N=3 rows of embeddings, from 0, got 3 in row 0",
        ),
        (
            (x, i - 1),
            ValueError,
            "pairs must be indices of the N=3 rows of embeddings, from 0, got -1 in row 0",
        ),
        (
            (nan, i),
            ValueError,
            "embeddings must be finite, and so their squared distances, got nan between rows 0 and 1",
        ),
        (
            (x + torch.tensor([[0.0], [0.0], [1e30]]), i),
            ValueError,
            "embeddings must be finite, and so their squared distances, got inf between rows 0 and 2",
        ),
    ]:
        with pytest.raises(kind) as caught:
            pair_distances(*arguments)
        assert str(caught.value) == f"pair_distances: {text}"
    with pytest.raises(ValueError, match='^pair_distances: distance must be one of "euclidean", '):
        pair_distances(x, i, distance="l2")


# ---- pairs of labels ---------------------------------------------------------------------------------------


def listed(labels: list[int]) -> dict[tuple[int, int], bool]:
    """Every pair, the smaller row first, and whether it is the same."""
    return {(i, j): labels[i] == labels[j] for i, j in itertools.combinations(range(len(labels)), 2)}


def as_dict(found) -> dict[tuple[int, int], bool]:
    assert found.pairs.dtype == np.int64 and found.same.dtype == bool
    assert found.pairs.shape == (len(found.same), 2)
    result = dict(zip(map(tuple, found.pairs.tolist()), found.same.tolist(), strict=True))
    assert len(result) == len(found.same)  # each at most once
    return result


@given(st.lists(st.integers(-2, 3), max_size=12))
def test_all_pairs(labels):
    found = all_pairs(np.array(labels, np.int64))
    assert as_dict(found) == listed(labels)
    assert found.pairs.tolist() == sorted(found.pairs.tolist(), key=lambda pair: pair[::-1])


@given(labels=st.lists(st.integers(-2, 3), min_size=2, max_size=12), seed=st.integers(0, 5))
def test_balanced_pairs_down_to_the_last(labels, seed):
    every = listed(labels)
    most = min(sum(every.values()), len(every) - sum(every.values()))
    for count in range(1, most + 1):
        found = balanced_pairs(torch.tensor(labels), count, seed=seed)
        assert as_dict(found).items() <= every.items()
        assert found.same.tolist() == [True, False] * count
        again = balanced_pairs(torch.tensor(labels), count, seed=seed)
        assert np.array_equal(again.pairs, found.pairs)
    with pytest.raises(ValueError, match=f"^balanced_pairs: count must be at most {most}, for there are "):
        balanced_pairs(torch.tensor(labels), most + 1, seed=seed)


def test_balanced_pairs_are_drawn_uniformly():
    labels = np.array([0, 0, 0, 1, 1, 2, 0])  # 6 + 1 same pairs, 14 different ones
    drawn = [balanced_pairs(labels, 2, seed=seed) for seed in range(3000)]
    counts = {pair: 0 for pair in listed(labels.tolist())}
    for found in drawn:
        for pair in map(tuple, found.pairs.tolist()):
            counts[pair] += 1
    for pair, same in listed(labels.tolist()).items():
        expected = 6000 / (7 if same else 14)  # of a binomial distribution: within five deviations
        assert abs(counts[pair] - expected) < 5 * expected**0.5, pair


def test_balanced_pairs_of_more_rows_than_pairs_could_be_listed_for():
    labels = np.arange(1_000_000) % 1000
    found = balanced_pairs(labels, 1000, seed=1)
    assert len(as_dict(found)) == 2000
    assert np.array_equal(labels[found.pairs[:, 0]] == labels[found.pairs[:, 1]], found.same)
    assert not np.array_equal(found.pairs, balanced_pairs(labels, 1000, seed=2).pairs)


@pytest.mark.parametrize("distance", DISTANCES)
def test_hardest_pairs(distance):
    x = torch.randn(40, 3, dtype=torch.float64)
    y = torch.arange(40) % 7
    every = listed(y.tolist())
    far = {pair: by_hand(*x[list(pair)].numpy(), distance) for pair in every}

    def hardest(same: bool) -> list[tuple[int, int]]:
        choose = max if same else min
        found = set()
        for row in range(40):
            mine = [pair for pair in every if row in pair and every[pair] == same]
            found.add(choose(mine, key=far.__getitem__))
        return sorted(found, key=far.__getitem__, reverse=same)

    found = hardest_pairs(x, y, distance=distance)
    count = min(len(hardest(True)), len(hardest(False)))
    as_dict(found)
    assert list(map(tuple, found.pairs[::2].tolist())) == hardest(True)[:count]
    assert list(map(tuple, found.pairs[1::2].tolist())) == hardest(False)[:count]
    few = hardest_pairs(x.numpy(), y.numpy(), 3, distance=distance)
    assert np.array_equal(few.pairs, found.pairs[:6]) and few.same.tolist() == [True, False] * 3


def test_errors_of_labels_word_for_word():
    x, y = torch.zeros(3, 2), np.arange(3)
    integers = "a tensor or array of integers of shape"
    for call, kind, text in [
        (lambda: all_pairs(y / 2), TypeError, f"all_pairs: labels must be {integers} [N], got float64 [3]"),
        (lambda: all_pairs([1, 2]), TypeError, f"all_pairs: labels must be {integers} [N], got list"),
        (
            lambda: all_pairs(np.arange(4473)),
            ValueError,
            "all_pairs: labels must be of at most 10000000 pairs (balanced_pairs draws some), got 4473"
            " labels, 10001628 pairs",
        ),
        (
            lambda: balanced_pairs(y % 2, 2),
            ValueError,
            "balanced_pairs: count must be at most 1, for there are 1 same and 2 different pairs, got int 2",
        ),
        (
            lambda: balanced_pairs(y, 0),
            ValueError,
            "balanced_pairs: count must be an integer >= 1, got int 0",
        ),
        (
            lambda: balanced_pairs(y % 2, 1, seed=-1),
            ValueError,
            "balanced_pairs: seed must be an integer >= 0",
        ),
        (
            lambda: balanced_pairs(y % 2, 1, seed=0.5),
            TypeError,
            "balanced_pairs: seed must be an integer >= 0",
        ),
        (
            lambda: hardest_pairs(x, y[:2]),
            ValueError,
            f"hardest_pairs: labels must be {integers} [N]=[3], got int64 [2]",
        ),
        (
            lambda: hardest_pairs(x / 0, y),
            ValueError,
            "hardest_pairs: embeddings must be finite, got NaN or inf among them",
        ),
        (
            lambda: hardest_pairs(x, y % 2, 3),
            ValueError,
            "hardest_pairs: count must be at most 1, for there are 1 same and 2 different pairs, got int 3",
        ),
    ]:
        with pytest.raises(kind, match=f"^{re.escape(text)}"):
            call()


# ---- files of arrays and pairs -----------------------------------------------------------------------------


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("mapped_from", [0, 2**28])
def test_embeddings_and_labels_from_files(tmp_path, monkeypatch, mapped_from):
    monkeypatch.setattr("deepsim_ext.verification.files.MAPPED_FROM", mapped_from)
    for dtype in (np.float16, np.float32, np.float64):
        x = np.random.default_rng(0).normal(size=(9, 4)).astype(dtype)
        np.save(tmp_path / "x.npy", x)
        loaded = load_embeddings(tmp_path / "x.npy")
        assert isinstance(loaded, np.memmap) == (mapped_from == 0)
        assert loaded.dtype == dtype and np.array_equal(loaded, x)
        indices = np.array([[0, 8], [3, 2]])
        assert np.array_equal(pair_distances(loaded, indices), pair_distances(x, indices))
        np.save(tmp_path / "x.npy", x.astype(x.dtype.newbyteorder("S")))
        assert np.array_equal(
            pair_distances(load_embeddings(tmp_path / "x.npy"), indices), pair_distances(x, indices)
        )
    np.save(tmp_path / "y.npy", np.array([1, -2, 3], np.int16))
    labels = load_labels(tmp_path / "y.npy")
    assert labels.dtype == np.int64 and labels.tolist() == [1, -2, 3]


class Hostile:
    def __reduce__(self):
        return print, ("code from a file was run",)


def test_broken_arrays(tmp_path, capsys):
    path = tmp_path / "x.npy"
    good = npy(np.ones((5, 3)))
    huge = good.replace(b"(5, 3)", b"(5000000000000, 3)").replace(b" " * 13 + b"\n", b"\n")
    with io.BytesIO() as file:
        np.savez(file, x=np.ones(3))
        archive = file.getvalue()
    for content, text in [
        (b"", ".npy file, got "),
        (good[:50], ".npy file, got "),
        (good[:-1], ".npy file, got "),
        (huge, ".npy file, got "),
        (b"0,1,2\n", ".npy file, got "),
        (archive, ".npy file, got a .npz file"),
        (npy(np.array([[Hostile()]]), allow_pickle=True), ".npy file, got "),
        (pickle.dumps(Hostile()), ".npy file, got "),
        (npy(np.ones((0, 3))), "of one number at least, got float64 [0, 3]"),
        (npy(np.ones(3)), "float16, float32 or float64 of shape [N, D] with D >= 1, got float64 [3]"),
        (npy(np.ones((3, 2), int)), "float64 of shape [N, D] with D >= 1, got int64 [3, 2]"),
        (npy(np.ones((3, 0))), "float64 of shape [N, D] with D >= 1, got float64 [3, 0]"),
    ]:
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^load_embeddings: {path} must be .*{re.escape(text)}"
        ) as caught:
            load_embeddings(path)
        assert "\n" not in str(caught.value) and "allow_pickle" not in str(caught.value)
    path.write_bytes(npy(np.ones(3)))
    with pytest.raises(ValueError, match=r"x\.npy must be integers of shape \[N\], got float64 \[3\]$"):
        load_labels(path)
    with pytest.raises(ValueError, match=r"none\.npy must be a \.npy file, got No such file or directory$"):
        load_labels(tmp_path / "none.npy")
    assert capsys.readouterr().out == ""


@given(cut=st.integers(0, 200), at=st.integers(0, 200), byte=st.integers(0, 255))
def test_damaged_arrays_load_or_say_which_file(tmp_path_factory, cut, at, byte):
    content = bytearray(npy(np.arange(6.0).reshape(3, 2)))
    content[at % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    path.write_bytes(content[: len(content) - cut])
    try:
        assert load_embeddings(path).ndim == 2
    except ValueError as problem:
        assert str(problem).startswith(f"load_embeddings: {path} must be ")


def test_pairs_from_a_file(tmp_path):
    path = tmp_path / "pairs.csv"
    for header in (
        "",
        "first,second,same\n",
        "first, second, same\r\n",
        "\ufefffirst,second,same\n",
        "\ufeff",
    ):
        path.write_text(header + "0,1,1\n7, 2 ,0\r\n3,3,1", encoding="utf-8")
        found = read_pairs(path)
        assert found.pairs.tolist() == [[0, 1], [7, 2], [3, 3]] and found.pairs.dtype == np.int64
        assert found.same.tolist() == [True, False, True]


def test_broken_pairs_word_for_word(tmp_path):
    path = tmp_path / "pairs.csv"
    line = "two indices and 0 or 1, got"
    for content, text in [
        (b"", " must be of at least one pair, got none"),
        (b"first,second,same\n", " must be of at least one pair, got none"),
        (b"a,b,same\n0,1,1\n", f", line 1, must be {line} 'a,b,same'"),
        (b"0,1,1\n0,1\n", f", line 2, must be {line} '0,1'"),
        (b"0,1,1\n\n0,1,1\n", f", line 2, must be {line} ''"),
        (b"0,1,1\nfirst,second,same\n", f", line 2, must be {line} 'first,second,same'"),
        (b"0,-1,1\n", f", line 1, must be {line} '0,-1,1'"),
        (b"0,1.0,1\n", f", line 1, must be {line} '0,1.0,1'"),
        (b"0,1,2\n", f", line 1, must be {line} '0,1,2'"),
        (b"0,1,1,1\n", f", line 1, must be {line} '0,1,1,1'"),
        ("0,²,1\n".encode(), f", line 1, must be {line} '0,²,1'"),
        (b"0," + b"9" * 30 + b",1\n", f", line 1, must be {line} '0,{'9' * 30},1'"),
        (b"0," + b"9" * 99 + b",1\n", f", line 1, must be {line} '0,{'9' * 58}…'"),
        (b"\xff0,1,1\n", " must be a readable .csv file, got 'utf-8' codec can't decode"),
        (b'0,"1', " must be a readable .csv file, got unexpected end of data"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(f'read_pairs: {path}{text}')}"):
            read_pairs(path)
    with pytest.raises(ValueError, match="folder must be a readable .csv file, got Is a directory"):
        (tmp_path / "folder").mkdir()
        read_pairs(tmp_path / "folder")


# ---- LFW ---------------------------------------------------------------------------------------------------

VIEW_2 = """2\t2
Ada\t1\t2
Bo_Li\t1\t3
Ada\t1\tBo_Li\t2
Cy\t1\tAda\t2
Cy\t1\t2
Ada\t3\t1
Cy\t2\tBo_Li\t1
Ada\t3\tCy\t1
"""


def test_pairs_of_lfw(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text(VIEW_2)
    found = read_lfw_pairs(path)
    assert found.folds == 2 and found.same.tolist() == [True, True, False, False] * 2
    named = [[found.images[i] for i in pair] for pair in found.pairs]
    assert named[0] == [("Ada", 1), ("Ada", 2)] and named[3] == [("Cy", 1), ("Ada", 2)]
    assert named[7] == [("Ada", 3), ("Cy", 1)]
    assert found.images[:4] == [("Ada", 1), ("Ada", 2), ("Bo_Li", 1), ("Bo_Li", 3)]
    assert len(set(found.images)) == len(found.images) == 8
    # From here to an accuracy: one embedding for each image.
    names = [name for name, _ in found.images]
    x = torch.stack([torch.eye(3)[sorted(set(names)).index(name)] for name in names])
    assert kfold_accuracy(pair_distances(x, found.pairs), found.same, folds=found.folds).mean == 1


def test_development_pairs_of_lfw(tmp_path):
    path = tmp_path / "pairsDevTrain.txt"
    path.write_bytes(b"1\r\nAda 1 2\r\nAda 1 Cy 1\r\n\r\n")
    found = read_lfw_pairs(path)
    assert found.folds == 1 and found.same.tolist() == [True, False]
    assert found.pairs.tolist() == [[0, 1], [0, 2]]


def test_broken_pairs_of_lfw_word_for_word(tmp_path):
    path = tmp_path / "pairs.txt"
    same = "a name and two numbers, for a same pair, got"
    different = "a name and a number, twice and of two names, for a different pair, got"
    for content, text in [
        ("", ", line 1, must be the number of folds and of pairs per fold, or of pairs alone, got ''"),
        (
            VIEW_2[1:].replace("\t", "x", 1),
            ", line 1, must be the number of folds and of pairs per fold, or of pairs alone, got 'x2'",
        ),
        (
            "0\t3\n",
            ", line 1, must be the number of folds and of pairs per fold, or of pairs alone, got '0\\t3'",
        ),
        (VIEW_2 + "Ada\t1\t2\n", " must be of 8 pairs, as its first line says, got 9 lines after it"),
        (VIEW_2[:-13], " must be of 8 pairs, as its first line says, got 7 lines after it"),
        ("99999999\t99999999\n", " must be of 19999999600000002 pairs, as its first line says, got 0 lines"),
        (VIEW_2.replace("Bo_Li\t1\t3", "Bo_Li\t1"), f", line 3, must be {same} 'Bo_Li\\t1'"),
        (VIEW_2.replace("Bo_Li\t1\t3", "Bo_Li\t1\tx"), f", line 3, must be {same} 'Bo_Li\\t1\\tx'"),
        (VIEW_2.replace("Bo_Li\t1\t3", "Bo_Li\t0\t3"), f", line 3, must be {same} 'Bo_Li\\t0\\t3'"),
        (VIEW_2.replace("Bo_Li\t1\t3", ""), f", line 3, must be {same} ''"),
        (VIEW_2.replace("Cy\t1\tAda\t2", "Cy\t1\t2"), f", line 5, must be {different} 'Cy\\t1\\t2'"),
        (VIEW_2.replace("Cy\t1\tAda\t2", "Cy\t1\tCy\t2"), f", line 5, must be {different} 'Cy\\t1\\tCy\\t2'"),
        (VIEW_2.replace("Cy\t1\tAda\t2", "Cy\t1\t../x\t2"), f", line 5, must be {different} 'Cy\\t1\\t../x"),
        (VIEW_2.replace("Cy\t1\tAda\t2", "..\t1\tAda\t2"), f", line 5, must be {different} '..\\t1\\tAda"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=f"^{re.escape(f'read_lfw_pairs: {path}{text}')}"):
            read_lfw_pairs(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must be a readable text file, got 'utf-8' codec"):
        read_lfw_pairs(path)


@given(st.text(alphabet="12\tAB \n/.", max_size=40))
def test_any_text_is_pairs_of_lfw_or_an_error_that_names_the_file(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.txt"
    path.write_text(text)
    try:
        assert len(read_lfw_pairs(path).pairs)
    except ValueError as problem:
        assert str(problem).startswith(f"read_lfw_pairs: {path}")


def test_image_files_of_lfw(tmp_path):
    images = [("Ada", 1), ("Ada", 12), ("Bo_Li", 1)]
    for name, file in [("Ada", "Ada_0001.jpg"), ("Ada", "Ada_0012.png"), ("Bo_Li", "Bo_Li_0001.jpg")]:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).touch()
    (tmp_path / "Ada" / "Ada_0001.png").touch()  # .jpg goes first
    files = lfw_files(images, tmp_path)
    assert [f.name for f in files] == ["Ada_0001.jpg", "Ada_0012.png", "Bo_Li_0001.jpg"]
    assert all(f.is_file() for f in files)
    with pytest.raises(ValueError) as caught:
        lfw_files([*images, *(("Cy", n) for n in range(1, 6))], tmp_path)
    assert str(caught.value) == (
        f"lfw_files: root must be a folder with all of 8 images, got no {tmp_path}/Cy/Cy_0001.jpg,"
        f" {tmp_path}/Cy/Cy_0002.jpg, {tmp_path}/Cy/Cy_0003.jpg and 2 more"
    )
    with pytest.raises(ValueError, match="^lfw_files: root must be a folder, got "):
        lfw_files(images, tmp_path / "none")
