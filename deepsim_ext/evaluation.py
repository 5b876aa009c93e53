"""How good embeddings are: precision@1, recall@k, R-precision, MAP@R, MRR of retrieval, NMI of clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._checks import evaluation as checks
from ._nearest_rows import WORKSPACE, check_comparable
from ._references import Advance, InMemory, Queries, References

FIRST_LOOK = 128  # neighbours among which the first match is looked for before all references are


class Rows(Protocol):
    """A tensor [N, D], or what has its rows elsewhere."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor) -> Tensor: ...


class RetrievalMetrics(NamedTuple):
    """Means over the queries that have a match among the references; NaN if none has."""

    precision_at_1: float
    recall_at_k: dict[int, float]  # by k
    r_precision: float
    mean_average_precision_at_r: float
    mean_reciprocal_rank: float
    queries: int  # with a match: those that the means are over
    lone_queries: int  # without


@torch.no_grad()
def retrieval_metrics(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    recall_at: tuple[int, ...] = (1, 2, 4, 8),
    distance: str = "euclidean",
    avg_of_avgs: bool = False,
) -> RetrievalMetrics:
    """Every embedding is a query: how well do the references nearest to it match its label?

    For a query with R > 0 matches among the references, which are sorted by distance and, where distances are
    equal, by index:

        precision@1   1 if the first reference matches, else 0
        recall@k      1 if one of the first k matches, else 0
        R-precision   matches among the first R, divided by R
        AP@R          sum over i <= R of precision@i if reference i matches, else 0; divided by R
        RR            1 / rank of the first match, however far behind it is

    Queries with R = 0 are left out. Sources: Musgrave, Belongie, Lim, "A Metric Learning Reality Check"
    (2020) for R-precision and MAP@R; Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search"
    (2011) for recall@k. The values are those of pytorch-metric-learning's `AccuracyCalculator` with its
    default k, all references; given a k, its mean_reciprocal_rank is 0 for a first match behind k. Memory is
    O((N + M) D) and a workspace: no N x M matrix.

    Args:
        embeddings: [N, D] with D >= 1; float32, float64, bfloat16 or float16 (computed in float32). Finite.
        labels: int64 [N].
        ref_embeddings: [M, D], dtype of `embeddings`. None, or `embeddings` itself: the other rows of
            `embeddings`, where no row is its own reference.
        ref_labels: int64 [M], given together with `ref_embeddings`.
        recall_at: a list or tuple of integers >= 1.
        distance: "euclidean", "sqeuclidean" or "cosine".
        avg_of_avgs: means over classes of the means over each class's queries.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance, values that are not finite or too long for their squares, or shapes or
            devices that do not go together.
    """
    function = "retrieval_metrics"
    x, labels, references, ref_labels, recall_at = checks.retrieval_metrics(
        function,
        embeddings,
        labels,
        ref_embeddings,
        ref_labels,
        recall_at=recall_at,
        distance=distance,
        avg_of_avgs=avg_of_avgs,
    )
    check_comparable(function, "embeddings", x)
    own = references is None  # no row is its own reference
    if own:
        references, ref_labels = x, labels
    else:
        check_comparable(function, "ref_embeddings", references)
    matches = count_matches(labels, ref_labels, own=own)
    searched = InMemory(references, ref_labels, distance)
    scores = scores_of_all(x, labels, matches, searched, ref_labels, first=0 if own else None)
    return summary(scores, matches, labels, recall_at=recall_at, avg_of_avgs=avg_of_avgs)


def nmi(embeddings: Tensor, labels: Tensor, *, seed: int = 0) -> float:
    """Normalised mutual information of labels and as many clusters by k-means, from 0 to 1.

    2 I(labels; clusters) / (H(labels) + H(clusters)). Source: Manning, Raghavan, Schuetze, "Introduction to
    Information Retrieval" (2008), 16.3; by scikit-learn, which comes with the extra `deepsim-ext[eval]`.

    Args:
        embeddings: [N, D] with N, D >= 1; float32, float64, bfloat16 or float16. Finite.
        labels: int64 [N].
        seed: of k-means, from 0 to 2**32 - 1.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: values that are not finite or too long for their squares, or wrong shapes.
    """
    x, seed = checks.nmi("nmi", embeddings, labels, seed)
    check_comparable("nmi", "embeddings", x)
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import normalized_mutual_info_score
    except ImportError as problem:
        raise ImportError("nmi: scikit-learn not installed; pip install deepsim-ext[eval]") from problem
    # Numbered from 0: what scikit-learn does with large integers does not matter.
    classes, labels = labels.unique(return_inverse=True)
    clusters = KMeans(len(classes), random_state=seed).fit_predict(x.detach().cpu().numpy())
    return float(normalized_mutual_info_score(labels.cpu().numpy(), clusters))


def count_matches(labels: Tensor, ref_labels: Tensor, *, own: bool) -> Tensor:
    """int64 [N]: how many of `ref_labels`, beside a row's own, are the same as each label."""
    classes, sizes = ref_labels.unique(return_counts=True)
    if not len(classes):
        return torch.zeros_like(labels)
    where = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[where] == labels, sizes[where], 0) - int(own)


def scores_of_all(
    x: Rows,
    labels: Tensor,
    matches: Tensor,
    references: References,
    ref_labels: Tensor,
    *,
    first: int | None,
    in_step: Callable[[Iterator[Tensor]], Iterator[Tensor]] = iter,
    advance: Advance = lambda _: None,
) -> Tensor:
    """`_scores_of` all of x, NaN for what has no match. `first` is where among the references x begins, None
    where it is none of them. Parts of the queries are asked for one after another, `in_step` with whoever
    else asks; `advance` is told of queries that are done."""
    scores = torch.full((len(x), 3), torch.nan, dtype=torch.float64, device=labels.device)
    for part in in_step(_parts_of(matches)):
        queries = Queries(x[part], labels[part], None if first is None else part + first)
        scores[part] = _scores_of(queries, matches[part], references, ref_labels)
        advance(len(part))
    return scores


def _parts_of(matches: Tensor) -> Iterator[Tensor]:
    """Queries with a match, the largest classes first: those of a part want about as many neighbours."""
    rows = matches.argsort(descending=True, stable=True)[: int((matches > 0).sum())]
    while len(rows):
        size = max(1, WORKSPACE // max(int(matches[rows[0]]), FIRST_LOOK))
        yield rows[:size]
        rows = rows[size:]


def _scores_of(queries: Queries, matches: Tensor, references: References, ref_labels: Tensor) -> Tensor:
    """float64 [Q, 3]: rank of the first match, R-precision, AP@R.

    Each query has matches int64 [Q] >= 1; ref_labels int64 [M] are those of all references.
    """
    own = int(queries.own is not None)
    most = int(matches.max()) if len(matches) else 0
    k = min(max(most, FIRST_LOOK), len(ref_labels) - own)
    indices = references.nearest(queries.embeddings, k + own).indices
    if queries.own is not None:
        indices = _without(indices, queries.own)
    match = ref_labels[indices] == queries.labels[:, None]
    position = torch.arange(1, k + 1, device=match.device)
    first = torch.where(match, position, k + 1).amin(dim=1)
    beyond = first > k
    behind = queries.take(beyond)
    first[beyond] = references.before(behind, references.matches(behind)) + 1
    match &= position <= matches[:, None]
    precision = match.cumsum(dim=1).double() / position
    r_precision = match.sum(dim=1).double() / matches
    average_precision = (precision * match).sum(dim=1) / matches
    return torch.stack([first.double(), r_precision, average_precision], dim=1)


def summary(
    scores: Tensor, matches: Tensor, labels: Tensor, *, recall_at: list[int], avg_of_avgs: bool
) -> RetrievalMetrics:
    """What `scores_of_all` [N, 3] come to."""
    counted = matches > 0
    rank, r_precision, average_precision = scores[counted].T
    weights = _weights(labels[counted]) if avg_of_avgs else None

    def mean(score: Tensor) -> float:
        score = score.double()
        return float(score.mean() if weights is None or not len(score) else (score * weights).sum())

    return RetrievalMetrics(
        precision_at_1=mean(rank == 1),
        recall_at_k={k: mean(rank <= k) for k in recall_at},
        r_precision=mean(r_precision),
        mean_average_precision_at_r=mean(average_precision),
        mean_reciprocal_rank=mean(1 / rank),
        queries=len(rank),
        lone_queries=len(labels) - len(rank),
    )


def _without(indices: Tensor, own: Tensor) -> Tensor:
    """[Q, k] of [Q, k + 1]: each row without its own index or, if that is not in it, without the last."""
    drop = indices == own[:, None]
    drop[:, -1] |= ~drop.any(dim=1)
    return indices[~drop].view(len(indices), indices.shape[1] - 1)


def _weights(labels: Tensor) -> Tensor:
    """float64 [Q], of sum 1: the same for every class, and for all queries of a class."""
    classes, which, sizes = labels.unique(return_inverse=True, return_counts=True)
    return 1 / (len(classes) * sizes[which].double())
