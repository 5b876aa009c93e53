"""Nearest rows by faiss' flat index, the same ones that `nearest_rows` finds.

The index works in float32 and, for many queries, by products that cancel. So it only narrows the gallery
down, to rows among which `nearest_rows` decides. Where the last of them is too near to the k-th to exclude
rounding, nothing is known of the rows left out, and `nearest_rows` searches all of them.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .._nearest_rows import nearest_rows
from ..results import NearestNeighbors

EXTRA = 16  # rows that faiss looks for beyond k
TOGETHER = 64  # queries that share the rows they were narrowed down to
CHUNK = 2**16  # rows that are converted at a time


def faiss_is_installed() -> bool:
    return importlib.util.find_spec("faiss") is not None


class FaissSearch:
    """A function of queries [Q, D] and k, 1 <= k <= G, over a gallery [G, D] of rows that can be compared."""

    def __init__(self, gallery: Tensor, distance: str) -> None:
        self.check_installed("Gallery")
        import faiss

        self.gallery, self.distance = gallery, distance
        if distance == "cosine":
            self.index = faiss.IndexFlatIP(gallery.shape[1])
        else:
            self.index = faiss.IndexFlatL2(gallery.shape[1])
            # Distances stay, cancellation does not; and float32 has room for every gallery of this length.
            self.center = gallery.mean(dim=0)
            lengths = [_norm(part - self.center).amax() for part in gallery.split(CHUNK)]
            self.length = torch.stack(lengths).amax().clamp(min=torch.finfo(gallery.dtype).tiny)
        for part in gallery.split(CHUNK):
            self.index.add(self._prepared(part).numpy())

    @staticmethod
    def check_installed(function: str) -> None:
        if not faiss_is_installed():
            raise ImportError(f"{function}: faiss not installed; pip install deepsim-ext[gallery]")

    def __call__(self, queries: Tensor, k: int) -> NearestNeighbors:
        prepared = self._prepared(queries)
        candidates = min(k + EXTRA, len(self.gallery))
        scores, rows = (torch.from_numpy(t) for t in self.index.search(prepared.numpy(), candidates))
        together = zip(queries.split(TOGETHER), rows.split(TOGETHER), strict=True)
        decided = [self._decided(*each, k) for each in together]
        distances, indices = (torch.cat(each) for each in zip(*decided, strict=True))
        if candidates < len(self.gallery):
            left_out = self._least(scores[:, -1].double(), prepared.double())
            missing = (rows < 0).any(dim=1)  # which faiss could not compare
            unsure = missing | ~(distances[:, -1] < left_out)  # NaN is unsure too
            if unsure.any():
                found = nearest_rows(queries[unsure], self.gallery, k, distance=self.distance)
                distances[unsure], indices[unsure] = found
        return NearestNeighbors(distances, indices)

    def _prepared(self, x: Tensor) -> Tensor:
        """What the index sees: float32 unit rows for cosine, else the gallery around 0, of length <= 1."""
        if self.distance == "cosine":
            largest = x.abs().amax(dim=1, keepdim=True)
            x = x / torch.where(largest == 0, 1, largest)
            norm = _norm(x)[:, None]
            x = x / torch.where(norm == 0, 1, norm)
        else:
            x = (x - self.center) / self.length
        return x.float()

    def _decided(self, queries: Tensor, candidates: Tensor, k: int) -> NearestNeighbors:
        """The k nearest among the candidates of all these queries."""
        # -1 is none; the first k rows are there for want of others.
        rows = torch.cat([candidates.flatten().clamp(min=0), torch.arange(k)]).unique()
        found = nearest_rows(queries, self.gallery[rows], k, distance=self.distance)
        return NearestNeighbors(found.distances, rows[found.indices])

    def _least(self, score: Tensor, queries: Tensor) -> Tensor:
        """float64 [Q]: what the distances of rows behind the last candidate, with that score, are above.

        A float32 sum of D products is off by less than D u times the product of lengths, u = 2^-24. For
        squared distances that is D u (|q| + |g|)^2: at most 16 D u |q|^2 if |g| <= 3 |q|, else 4 D u times
        the squared distance itself. The 8 beside D is for rounding before and after; all of it twice.
        """
        off = 2 * (queries.shape[1] + 8) * 2.0**-24
        if self.distance == "cosine":
            return 1 - score - off
        squared = score * (1 - 4 * off) - 16 * off * queries.square().sum(dim=1)
        length = self.length.double()
        if self.distance == "sqeuclidean":
            return squared * length.square()
        return squared.clamp(min=0).sqrt() * length


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)
