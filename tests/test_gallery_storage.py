"""Saved galleries: the same ones again, whatever happens while they are written and whoever wrote them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from deepsim_ext.recognition import Gallery, storage

ZEROS = torch.zeros(3, 2)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A gallery of two identities and three templates."""
    gallery = Gallery(2, threshold=1.5)
    gallery.enroll(["a", "b", "a"], torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    gallery.save(tmp_path / "gallery")
    return tmp_path / "gallery"


def same(a: Gallery, b: Gallery) -> bool:
    return (
        a.identities == b.identities
        and (a.distance, a.threshold, a.dtype) == (b.distance, b.threshold, b.dtype)
        and all(torch.equal(a.templates(name), b.templates(name)) for name in a.identities)
    )


def embeddings_of(folder: Path) -> Path:
    (path,) = folder.glob("embeddings-*.safetensors")
    return path


def with_content(folder: Path, **changes: object) -> None:
    """Changes values of the JSON; ... removes a key."""
    path = folder / "gallery.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def with_embeddings(folder: Path, data: bytes) -> None:
    """Other templates, with the hash that belongs to them."""
    embeddings_of(folder).unlink()
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / f"embeddings-{sha256}.safetensors").write_bytes(data)
    with_content(folder, sha256=sha256)


def error_of(folder: Path) -> str:
    with pytest.raises(ValueError) as raised:
        Gallery.load(folder)
    text = str(raised.value)
    assert "\n" not in text and text.startswith(str(folder)), text
    return text.removeprefix(f"{folder}/")


# ---- what is saved is what is loaded -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_saved_gallery_is_the_same(tmp_path, distance, dtype):
    gallery = Gallery(7, distance=distance, threshold=0.1 + 0.2, dtype=dtype)
    names = ["Åsa", "李", "a\nb", "../../etc/passwd", "\x00", "null", " "]
    gallery.enroll([names[i] for i in torch.randint(7, (40,))], torch.randn(40, 7).to(dtype))
    gallery.save(tmp_path)
    loaded = Gallery.load(tmp_path, backend="exact")
    assert same(gallery, loaded) and loaded.backend == "exact"
    queries = torch.randn(9, 7).to(dtype)
    assert gallery.identify(queries, 3).identities == loaded.identify(queries, 3).identities
    loaded.enroll(names[2], torch.randn(7).to(dtype))
    loaded.remove(names[0])
    assert len(loaded) == len(gallery) - 1
    assert sorted(os.listdir(tmp_path)) == [embeddings_of(tmp_path).name, "gallery.json"]


def test_an_empty_gallery_is_one_too(tmp_path):
    Gallery(3).save(tmp_path)
    loaded = Gallery.load(str(tmp_path))
    assert same(loaded, Gallery(3)) and loaded.embedding_size == 3
    loaded.enroll("a", torch.zeros(3))
    assert loaded.identify(torch.zeros(3)).identities == [["a"]]


def test_saving_replaces_what_was_there_and_nothing_else(folder):
    (folder / "embeddings-of-mine.safetensors").write_text("mine")
    (folder / f"embeddings-{'0' * 64}.safetensors").write_text("left by a crash")
    (folder / f".embeddings-{'0' * 64}.safetensors.part").write_text("left by a crash")
    gallery = Gallery.load(folder)
    gallery.remove("a")
    gallery.save(folder)
    assert same(gallery, Gallery.load(folder))
    assert len(os.listdir(folder)) == 3
    assert (folder / "embeddings-of-mine.safetensors").read_text() == "mine"


def test_no_gallery(tmp_path):
    with pytest.raises(FileNotFoundError):
        Gallery.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Gallery(2).save(tmp_path / "no" / "parents")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("which", range(4))
def test_a_crash_leaves_the_old_gallery_or_the_new_one(folder, monkeypatch, call, which):
    old, new = Gallery.load(folder), Gallery(2)
    new.enroll("c", torch.tensor([9.0, 9.0]))
    calls, function = [], getattr(os, call)

    def crash(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == which + 1:
            raise KeyboardInterrupt
        function(*arguments)

    monkeypatch.setattr(storage.os, call, crash)
    try:
        new.save(folder)
        finished = True
    except KeyboardInterrupt:
        finished = False
    monkeypatch.undo()
    replaced = {"replace": 2, "fsync": 3}[call]  # from then on it is the new one
    assert finished == (which >= {"replace": 2, "fsync": 4}[call])
    assert same(Gallery.load(folder), new if which >= replaced else old)
    new.save(folder)
    assert same(Gallery.load(folder), new) and len(os.listdir(folder)) == 2


def test_a_gallery_that_is_replaced_while_it_is_read(folder, monkeypatch):
    new = Gallery(2)
    new.enroll("c", torch.tensor([9.0, 9.0]))
    path, read = embeddings_of(folder), storage._read

    def late(asked: Path, *sizes: int) -> bytes:
        if asked == path and path.exists():
            new.save(folder)
        return read(asked, *sizes)

    monkeypatch.setattr(storage, "_read", late)
    assert same(Gallery.load(folder), new)
    embeddings_of(folder).unlink()
    assert error_of(folder).endswith(".safetensors: missing")


def test_a_link_in_the_place_of_a_part_is_not_followed(folder, tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (folder / ".gallery.json.part").symlink_to(precious)
    Gallery(2).save(folder)
    assert precious.read_text() == "precious" and len(Gallery.load(folder)) == 0
    (folder / ".gallery.json.part").symlink_to(precious)
    monkeypatch.setattr(
        storage.Path, "unlink", lambda path, missing_ok: None
    )  # as if it were put there after
    with pytest.raises(FileExistsError):
        Gallery(2).save(folder)
    assert precious.read_text() == "precious"


# ---- hostile files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "other"}, "not a gallery of deepsim_ext"),
        ({"version": 2}, "of version 2, this is version 1"),
        ({"version": True}, "version must be an integer"),
        ({"version": ...}, "version must be an integer"),
        ({"counts": ...}, "expected the keys format, version, "),
        ({"code": "import os"}, "expected the keys format, version, "),
        ({"embedding_size": 0}, "embedding_size must be >= 1"),
        ({"embedding_size": -2}, "embedding_size must be >= 1"),
        ({"embedding_size": 2.0}, "embedding_size must not be float"),
        ({"embedding_size": True}, "embedding_size must not be bool"),
        ({"dtype": "object"}, "dtype must be one of float32, float64"),
        ({"distance": "l2"}, "distance must be one of euclidean, sqeuclidean, cosine"),
        ({"threshold": -1}, "gallery: threshold must be a finite number >= 0, got int -1"),
        ({"threshold": float("nan")}, "gallery: threshold must be a finite number >= 0, got float nan"),
        ({"threshold": 10**400}, "gallery: threshold must be a finite number >= 0, got int 1000"),
        ({"threshold": "1"}, "threshold must not be str"),
        ({"identities": ["a"]}, "1 identities with 2 counts"),
        ({"identities": ["a", "a"]}, "an identity is there twice"),
        ({"identities": ["a", ""]}, 'identities: identity must be a str of at least one character, got ""'),
        (
            {"identities": ["a", ["b"]]},
            "identities: identity must be a str of at least one",
        ),
        ({"identities": ["a", "\ud800"]}, "identities: identity must be a str without surrogates"),
        ({"identities": "ab"}, "identities must not be str"),
        ({"counts": [4, -1]}, "counts must be integers >= 1"),
        ({"counts": [3, 0]}, "counts must be integers >= 1"),
        ({"counts": [2, True]}, "counts must be integers >= 1"),
        ({"counts": [2, 1.0]}, "counts must be integers >= 1"),
        ({"sha256": "../" * 20 + "etc/passwd"}, "sha256 must be 64 hexadecimal digits"),
        ({"sha256": "a" * 63 + "\n"}, "sha256 must be 64 hexadecimal digits"),
        ({"sha256": "A" * 64}, "sha256 must be 64 hexadecimal digits"),
    ],
)
def test_json_of_wrong_values(folder, changes, text):
    with_content(folder, **changes)
    assert error_of(folder).startswith(f"gallery.json: {text}")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no JSON: "),
        (b"\xff\xfe", "no JSON: "),
        (b"[" * 100_000, "no JSON: "),
        (b"9" * 10_000, "no JSON: "),
        (b"[]", "not a gallery"),
        (b"null", "not a gallery"),
        (pickle.dumps({"format": "deepsim_ext gallery"}), "no JSON: "),
    ],
)
def test_a_json_file_that_is_none(folder, data, text):
    (folder / "gallery.json").write_bytes(data)
    assert error_of(folder).startswith(f"gallery.json: {text}")


@pytest.mark.parametrize(
    ("counts", "size", "dtype"),
    [
        ([2, 2], 2, "float32"),
        ([10**15, 10**15], 2, "float32"),
        ([2, 1], 10**30, "float32"),
        ([2, 1], 2, "float64"),
    ],
)
def test_sizes_that_the_file_does_not_have(folder, counts, size, dtype):
    with_content(folder, counts=counts, embedding_size=size, dtype=dtype)
    least = sum(counts) * size * {"float32": 4, "float64": 8}[dtype]
    actual = embeddings_of(folder).stat().st_size
    if actual < least:
        said = f"{actual} bytes, where there should be {least} to {least + 4096}"
    else:  # a header can be that long
        said = f"expected {dtype} [{sum(counts)}, {size}], got float32 [3, 2]"
    assert error_of(folder) == f"{embeddings_of(folder).name}: {said}"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (save({"templates": ZEROS.double()}), "expected float32 [3, 2], got float64 [3, 2]"),
        (save({"templates": torch.zeros(6)}), "expected float32 [3, 2], got float32 [6]"),
        (save({"templates": torch.zeros(2, 3)}), "expected float32 [3, 2], got float32 [2, 3]"),
        (save({"templates": ZEROS.int()}), "expected float32 [3, 2], got int32 [3, 2]"),
        (save({"other": ZEROS}), "expected one tensor \"templates\", got ['other']"),
        (
            save({"templates": ZEROS, "x": torch.ones(1)}),
            "expected one tensor \"templates\", got ['templates', 'x']",
        ),
        (save({"templates": ZEROS / 0}), "templates must be finite, with rows shorter than 1e+18, got a NaN"),
        (
            save({"templates": ZEROS + 1e30}),
            "finite, with rows shorter than 1e+18, got a longer",
        ),
        (pickle.dumps(ZEROS), "no safetensors file: "),
        (struct.pack("<Q", 2**63) + b" " * 100, "no safetensors file: "),
        (b"\x00" * 100, "no safetensors file: "),
        (bytes(5000), "5000 bytes, where there should be 24 to 4120"),
        (b"", "0 bytes, where there should be 24 to 4120"),
    ],
)
def test_templates_of_another_kind(folder, data, text):
    with_embeddings(folder, data)
    assert text in error_of(folder)


def test_templates_that_do_not_belong_to_the_json(folder):
    path = embeddings_of(folder)
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert (
        error_of(folder) == f"{path.name}: not the file that gallery.json belongs to: its SHA-256 is another"
    )


@pytest.mark.parametrize("name", ["gallery.json", "embeddings"])
def test_links_pipes_and_folders_are_not_read(folder, tmp_path, name):
    path = embeddings_of(folder) if name == "embeddings" else folder / name
    outside = tmp_path / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    assert error_of(folder) == f"{path.name}: a link, not a file"
    path.unlink()
    os.mkfifo(path)
    assert error_of(folder) == f"{path.name}: not a regular file"
    path.unlink()
    path.mkdir()
    assert error_of(folder) == f"{path.name}: not a regular file"


ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=5
)


def loads_or_says_why(folder: Path, original: Gallery) -> None:
    try:
        loaded = Gallery.load(folder)
    except (ValueError, FileNotFoundError) as problem:
        assert str(folder) in str(problem) and "\n" not in str(problem)
    else:  # then it is a whole gallery, of the same templates
        assert loaded.template_count == original.template_count
        loaded.identify(torch.zeros(1, 2), 3)
        assert all(torch.equal(a, b) for a, b in zip(loaded._templates, original._templates, strict=True))


@given(data=st.data())
def test_any_value_in_the_json(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    gallery = Gallery(2, threshold=1.5)
    gallery.enroll(["a", "b", "a"], torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    gallery.save(folder)
    key = data.draw(st.sampled_from([*storage.KEYS]))
    with_content(folder, **{key: data.draw(JSON)})
    loads_or_says_why(folder, gallery)


@given(data=st.data())
def test_any_damage_to_the_files(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    gallery = Gallery(2)
    gallery.enroll(["a", "b", "a"], torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    gallery.save(folder)
    path = data.draw(st.sampled_from([folder / "gallery.json", embeddings_of(folder)]))
    whole = path.read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:])
    loads_or_says_why(folder, gallery)


@given(data=st.data())
def test_any_templates_of_the_right_hash(data, tmp_path_factory):
    """Damage that the hash does not give away: the header of the safetensors file."""
    folder = tmp_path_factory.mktemp("gallery")
    gallery = Gallery(2)
    gallery.enroll(["a", "b", "a"], torch.tensor([[1.0, 2], [3, 4], [5, 6]]))
    gallery.save(folder)
    whole = embeddings_of(folder).read_bytes()
    start = data.draw(st.integers(0, len(whole) - 24))
    end = data.draw(st.integers(start, len(whole) - 24))
    with_embeddings(folder, whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:])
    loads_or_says_why(folder, gallery)
