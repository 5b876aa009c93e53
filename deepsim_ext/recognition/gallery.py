"""Who is this? A gallery of identities, searched by the distances of embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import recognition as checks
from .._checks.options import positive_integer
from .._checks.texts import describe, error
from .._nearest_rows import WORKSPACE, check_comparable, nearest_rows
from ..nearest_neighbors import nearest_neighbors
from ..results import NearestNeighbors
from . import storage
from .faiss_search import FaissSearch, faiss_is_installed

# Where faiss is the faster one: few queries, for which it need not copy the gallery first.
FAISS_TEMPLATES, FAISS_QUERIES = 100_000, 16


class Identification(NamedTuple):
    """The nearest identities of every query, nearest first."""

    identities: list[list[str | None]]  # Q lists of k; None is unknown
    distances: Tensor  # [Q, k], ascending; inf where there are fewer than k identities


class Verification(NamedTuple):
    """Whether queries are who they are said to be."""

    same: Tensor  # bool [Q]
    distances: Tensor  # [Q], to the nearest template


class Gallery:
    """Identities with one or more embeddings each, their templates; the nearest of them is what counts.

    Identities come and go without training. Equal distances go to the identity that was enrolled first.
    Everything is held and searched on the CPU. Source: Phillips, Grother, Micheals, "Evaluation Methods in
    Face Recognition" (2011).

    Search is exact by either backend, with the same identities: `nearest_neighbors`, which copies the gallery
    for every search, or faiss' flat index, which holds a float32 copy. faiss narrows the gallery down, and
    `nearest_neighbors` decides; queries for which that cannot be shown to be right it searches itself.

    Args:
        embedding_size: D >= 1.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).
        threshold: finite, >= 0: a query is an identity if their distance is less. None: of any distance.
            An attribute of the same name that may be set.
        dtype: torch.float32 or torch.float64, of templates and distances. Embeddings may be narrower.
        backend: "exact"; "faiss" (extra `deepsim-ext[gallery]`); or "auto": faiss, if it is installed, for up
            to 16 queries against 100,000 templates or more, where it is the faster one.

    Raises:
        TypeError, ValueError: for an argument that is none of the above.
        ImportError: backend "faiss", which is not installed.
    """

    def __init__(
        self,
        embedding_size: int,
        *,
        distance: str = "euclidean",
        threshold: float | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        self.embedding_size = checks.gallery_options(
            "Gallery", embedding_size=embedding_size, distance=distance, dtype=dtype, backend=backend
        )
        self.distance, self.dtype, self.backend = distance, dtype, backend
        self.threshold = threshold
        if backend == "faiss":
            FaissSearch.check_installed("Gallery")
        self._names: list[str] = []  # in order of enrolment
        self._numbers: dict[str, int] = {}  # where in that list a name stands
        self._templates = torch.empty(0, self.embedding_size, dtype=dtype)  # in order of identities
        self._owners = torch.empty(0, dtype=torch.int64)  # number of the identity, for each template
        self._enrolled: list[tuple[Tensor, Tensor]] = []  # numbers and templates since then
        self._faiss: FaissSearch | None = None

    @property
    def threshold(self) -> float | None:
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float | None) -> None:
        self._threshold = checks.threshold("Gallery", threshold)

    @property
    def identities(self) -> list[str]:
        """In order of enrolment."""
        return list(self._names)

    @property
    def template_count(self) -> int:
        return len(self._put_together()[1])

    def __len__(self) -> int:
        """How many identities there are."""
        return len(self._names)

    def __contains__(self, identity: object) -> bool:
        return identity in self._numbers

    def __repr__(self) -> str:
        return (
            f"Gallery({self.embedding_size}, distance={self.distance!r}, threshold={self.threshold!r},"
            f" dtype={self.dtype}, backend={self.backend!r}): {len(self)} identities"
        )

    def enroll(self, identity: str | Sequence[str], embeddings: Tensor) -> None:
        """Adds templates to an identity, which need not be there before, or to many.

        Args:
            identity: a name that is not empty, or a list or tuple of K of them, one per row.
            embeddings: [K, D] with K >= 1, or [D] for one; the gallery's dtype or a narrower one.

        Raises:
            TypeError: an argument of the wrong Python type or dtype.
            ValueError: an empty name, or embeddings of another shape, not finite or too long for their
                squares. The gallery is as before.
        """
        rows = self._rows("enroll", "embeddings", embeddings, "K")
        names = checks.names_of_rows("enroll", identity, len(rows))
        for name in names:
            if name not in self:
                self._numbers[name] = len(self._names)
                self._names.append(name)
        self._enrolled.append((torch.tensor([self._numbers[name] for name in names]), rows.clone()))

    def remove(self, identity: str) -> None:
        """Forgets an identity and its templates; ValueError if there is none of that name."""
        number = self._number("remove", identity)
        templates, owners = self._put_together()
        kept = owners != number
        self._templates, owners = templates[kept], owners[kept]
        self._owners = owners - (owners > number).long()
        self._faiss = None
        del self._names[number]
        self._numbers = {name: i for i, name in enumerate(self._names)}

    def templates(self, identity: str) -> Tensor:
        """A copy of its templates [K, D], in order of enrolment; ValueError if there is none of that name."""
        return self._templates_of(self._number("templates", identity))

    def identify(self, queries: Tensor, k: int = 1) -> Identification:
        """The k nearest identities of every query, None for those not nearer than the threshold.

        Where there are fewer than k identities, the rest is None at distance inf.

        Args:
            queries: [Q, D], or [D] for one; the gallery's dtype or a narrower one.
            k: an integer >= 1.

        Raises:
            TypeError: an argument of the wrong Python type or dtype.
            ValueError: queries of another shape, not finite or too long for their squares, or k < 1.
        """
        distances, indices = self.search(queries, k)
        if self.threshold is not None:
            indices = torch.where(distances < self.threshold, indices, -1)
        names = [[None if i < 0 else self._names[i] for i in row] for row in indices.tolist()]
        return Identification(names, distances)

    def verify(self, identity: str, queries: Tensor) -> Verification:
        """Is each query [Q, D], or [D] for one, that identity: is its distance less than the threshold?

        Raises:
            TypeError: an argument of the wrong Python type or dtype.
            ValueError: no threshold, no identity of that name, or queries of another shape, not finite or too
                long for their squares.
        """
        if self.threshold is None:
            raise error(ValueError, "verify", "threshold of the gallery", "a number", "None")
        templates = self._templates_of(self._number("verify", identity))
        rows = self._rows("verify", "queries", queries, "Q")
        distances = nearest_neighbors(rows, templates, 1, distance=self.distance).distances[:, 0]
        return Verification(distances < self.threshold, distances)

    def search(self, queries: Tensor, k: int) -> NearestNeighbors:
        """`identify` without names and threshold: distances [Q, k], indices int64 [Q, k] into `identities`.

        An index is -1, at distance inf, where there are fewer than k identities.
        """
        k = positive_integer("search", "k", k)
        rows = self._rows("search", "queries", queries, "Q")
        owners = self._put_together()[1]
        distances = rows.new_full((len(rows), k), torch.inf)
        indices = torch.full_like(distances, -1, dtype=torch.int64)
        wanted = min(k, len(self))
        if not wanted:
            return NearestNeighbors(distances, indices)
        nearest = self._backend(len(rows))
        # One identity more than wanted, of average size; four times as many where those were too few.
        take, unsure = (wanted + 1) * -(-len(owners) // len(self)), torch.arange(len(rows))
        while len(unsure):
            take = min(take, len(owners))
            again = []
            for part in unsure.split(max(1, WORKSPACE // take)):
                found = nearest(rows[part], take)
                first = _first_of_each(owners[found.indices], wanted)
                sure = (first < take).all(dim=1)
                first, done = first[sure], part[sure]
                distances[done, :wanted] = found.distances[sure].gather(1, first)
                indices[done, :wanted] = owners[found.indices[sure].gather(1, first)]
                again.append(part[~sure])
            take, unsure = 4 * take, torch.cat(again)
        return NearestNeighbors(distances, indices)

    def save(self, folder: str | PathLike[str]) -> None:
        """Writes the gallery to a folder, made if need be, in place of the one there; see `storage`."""
        templates, owners = self._put_together()
        counts = owners.bincount().tolist()
        storage.write(
            folder, storage.Stored(templates, self.identities, counts, self.distance, self.threshold)
        )

    @classmethod
    def load(cls, folder: str | PathLike[str], *, backend: str = "auto") -> Gallery:
        """The gallery that was saved to a folder; no code runs from its files.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: there is no gallery.
            ValueError: a file is not what `save` writes; the text names it.
        """
        stored = storage.read(folder)
        templates = stored.templates
        gallery = cls(
            templates.shape[1],
            distance=stored.distance,
            threshold=stored.threshold,
            dtype=templates.dtype,
            backend=backend,
        )
        gallery._names = stored.identities
        gallery._numbers = {name: i for i, name in enumerate(stored.identities)}
        gallery._templates = templates
        gallery._owners = torch.arange(len(gallery)).repeat_interleave(torch.tensor(stored.counts).long())
        return gallery

    def _rows(self, function: str, argument: str, x: Tensor, length: str) -> Tensor:
        """[length, D], of the gallery's dtype and on the CPU, of an argument of embeddings."""
        x = checks.gallery_rows(function, argument, x, length, self.embedding_size, self.dtype)
        x = x.detach().to("cpu", self.dtype)
        check_comparable(function, argument, x)
        return x

    def _number(self, function: str, identity: str) -> int:
        checks.identity_name(function, identity)
        if identity not in self._numbers:
            raise error(ValueError, function, "identity", "in the gallery", describe(identity))
        return self._numbers[identity]

    def _templates_of(self, number: int) -> Tensor:
        templates, owners = self._put_together()
        return templates[owners == number]

    def _put_together(self) -> tuple[Tensor, Tensor]:
        """Templates and owners with all that was enrolled."""
        if self._enrolled:
            owners = torch.cat([self._owners, *(numbers for numbers, _ in self._enrolled)])
            templates = torch.cat([self._templates, *(rows for _, rows in self._enrolled)])
            self._owners, order = owners.sort(stable=True)
            self._templates = templates[order]
            self._enrolled, self._faiss = [], None
        return self._templates, self._owners

    def _backend(self, queries: int) -> Callable[[Tensor, int], NearestNeighbors]:
        """The function of queries and k that finds the nearest templates."""
        worth_it = len(self._owners) >= FAISS_TEMPLATES and queries <= FAISS_QUERIES
        if self.backend == "faiss" or (self.backend == "auto" and worth_it and faiss_is_installed()):
            if self._faiss is None:
                self._faiss = FaissSearch(self._templates, self.distance)
            return self._faiss
        return lambda rows, k: nearest_rows(rows, self._templates, k, distance=self.distance)


def _first_of_each(owners: Tensor, wanted: int) -> Tensor:
    """int64 [Q, wanted]: where in a row of `owners` [Q, K] a new owner stands; K if there are no more."""
    in_order, order = owners.sort(dim=1, stable=True)
    new = torch.ones_like(in_order, dtype=torch.bool)
    new[:, 1:] = in_order.diff(dim=1) != 0
    positions = torch.where(new, order, owners.shape[1]).sort(dim=1).values
    return positions[:, :wanted]
