"""Miners and losses of pytorch-metric-learning 2.9 over `deepsim_ext.functional`.

Names, constructor arguments, defaults and calls are theirs: `miner(embeddings, labels, ref_emb=None,
ref_labels=None)` gives index tuples that their losses take, and `loss(embeddings, labels, indices_tuple=None,
ref_emb=None, ref_labels=None)` takes index tuples of their miners. embeddings [N, D], ref_emb [M, D], labels
of an integer dtype [N] and [M]. Losses are scalars in float32, or in float64 for float64 embeddings.

`distance` is None (as theirs: Euclidean between L2-normalised embeddings) or one of their objects:
LpDistance(p=2) with power 1 or 2, normalised or not; CosineSimilarity; DotProductSimilarity of normalised
embeddings. `reducer` is None (as theirs: AvgNonZeroReducer), or an AvgNonZeroReducer, a ThresholdReducer with
low=0 alone, a MeanReducer or a SumReducer. Both are told by the name of their class, so that nothing is
imported from there.

Not supported, and an error that names the argument: other distances and reducers, embedding regularizers,
collected statistics, negative margins.

Where 2.9 is wrong these are not: distances do not cancel far from the origin; a NaN is not left out of a
mean; the gradient of a cosine at a zero vector is 0; `swap` with references takes the distance between two
references (theirs, between an embedding and a reference); a list of one pair has a loss; and see
`CrossBatchMemory`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks, functional
from .._checks.options import choice, margin_value
from .._checks.tensors import check_columns, check_embeddings, compute_dtype, match_dtypes
from .._checks.texts import describe, error
from . import _mining, _pairs
from ._pairs import Batch

__all__ = [
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "ContrastiveLoss",
    "CrossBatchMemory",
    "TripletMarginLoss",
    "TripletMarginMiner",
]

_REDUCTIONS = {
    "AvgNonZeroReducer": "mean_nonzero",
    "ThresholdReducer": "mean_nonzero",
    "MeanReducer": "mean",
    "SumReducer": "sum",
}

# Farther than any two rows can be apart: as pos_margin it leaves the negatives alone.
_FAR = torch.finfo(torch.float32).max


class _Distance(NamedTuple):
    """What a distance object of theirs means."""

    name: str  # as in `functional`
    normalized: bool
    similarity: bool  # they give margins and ranges in similarity, which is 1 - distance


class _Module(nn.Module):
    """What miners and losses have in common: how they measure, and how they are called."""

    _shown: tuple[str, ...] = ()  # attributes that its repr names

    def __init__(self, distance: Any, collect_stats: bool | None) -> None:
        super().__init__()
        if collect_stats:
            raise error(ValueError, type(self).__name__, "collect_stats", "None or False", "True")
        self._distance = _distance_of(type(self).__name__, distance)
        self.distance = distance

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)

    def _batch(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        own: Tensor | None = None,
    ) -> Batch:
        """The arguments of a call, checked, as `functional` and the plain-torch parts take them.

        Without labels: for listed pairs and triplets, which need none.
        """
        if ref_emb is None:
            ref_emb, ref_labels = embeddings, labels
        # As theirs: one tensor of labels for both means that row i of one is row i of the other.
        paired = labels is not None and ref_labels is labels
        labels, ref_labels = _integers(labels, embeddings), _integers(ref_labels, ref_emb)
        _check(type(self).__name__, embeddings, labels, ref_emb, ref_labels)
        if own is None and paired:
            own = torch.arange(len(embeddings), device=embeddings.device)
        x = self._measured(embeddings)
        if ref_emb is not embeddings:
            ref = self._measured(ref_emb)
        else:  # of other labels than the batch's own it is a reference set, hence another tensor
            ref = x if paired or labels is None else x.view_as(x)
        return Batch(x, labels, ref, labels if paired else ref_labels, own)

    def _measured(self, embeddings: Tensor) -> Tensor:
        if not self._distance.normalized:
            return embeddings
        return nn.functional.normalize(embeddings.to(compute_dtype(embeddings)))


# ---- miners ------------------------------------------------------------------------------------------------


class _Miner(_Module):
    def __init__(self, *, distance: Any = None, collect_stats: bool | None = None) -> None:
        super().__init__(distance, collect_stats)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """int64 (anchors, positives, negatives), or (anchors, positives, anchors, negatives) for pairs."""
        with torch.no_grad():
            indices = self._mine(self._batch(embeddings, labels, ref_emb, ref_labels))
        if len(indices) == 3:
            self.num_triplets = len(indices[0])
        else:
            self.num_pos_pairs, self.num_neg_pairs = len(indices[0]), len(indices[2])
        return indices

    def _mine(self, batch: Batch) -> tuple[Tensor, ...]:
        raise NotImplementedError


class BatchEasyHardMiner(_Miner):
    """A positive and a negative for every anchor that has both, or all positives, or all negatives: pairs.

    One of each comes from the fused `batch_hard_mine`; all of a kind, and allowed ranges, from plain torch in
    chunks of anchors. Identical rows: the lowest index.
    """

    _shown = ("pos_strategy", "neg_strategy", "allowed_pos_range", "allowed_neg_range")
    HARD, SEMIHARD, EASY, ALL = "hard", "semihard", "easy", "all"
    all_batch_mining_strategies = [HARD, SEMIHARD, EASY, ALL]

    def __init__(
        self,
        pos_strategy: str = EASY,
        neg_strategy: str = SEMIHARD,
        allowed_pos_range: tuple[float, float] | None = None,
        allowed_neg_range: tuple[float, float] | None = None,
        *,
        distance: Any = None,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats)
        name = type(self).__name__
        for argument, strategy in (("pos_strategy", pos_strategy), ("neg_strategy", neg_strategy)):
            choice(name, argument, strategy, tuple(self.all_batch_mining_strategies))
        if {pos_strategy, neg_strategy} in ({self.SEMIHARD}, {self.SEMIHARD, self.ALL}):
            expected = f'"easy" or "hard" with pos_strategy="{pos_strategy}"'
            raise error(ValueError, name, "neg_strategy", expected, describe(neg_strategy))
        self.pos_strategy, self.neg_strategy = pos_strategy, neg_strategy
        self.allowed_pos_range, self.allowed_neg_range = allowed_pos_range, allowed_neg_range

    def _mine(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        strategies = self.pos_strategy, self.neg_strategy
        if strategies == (self.ALL, self.ALL):
            return _pairs.all_pairs(batch)
        ranges = self.allowed_pos_range, self.allowed_neg_range
        if self.ALL not in strategies and ranges == (None, None) and batch.fused:
            a, p, n = functional.batch_hard_mine(
                *batch.arguments,
                positive=self.pos_strategy,
                negative=self.neg_strategy,
                distance=self._distance.name,
            )
            return a, p, a, n
        p, n = _mining.pick(
            batch,
            *strategies,
            distance=self._distance.name,
            similarity=self._distance.similarity,
            positive_range=ranges[0],
            negative_range=ranges[1],
        )
        if self.pos_strategy == self.ALL:
            a = (n >= 0).nonzero().squeeze(1)
            return *_pairs.all_pairs(batch)[:2], a, n[a]
        if self.neg_strategy == self.ALL:
            a = (p >= 0).nonzero().squeeze(1)
            return a, p[a], *_pairs.all_pairs(batch)[2:]
        a = ((p >= 0) & (n >= 0)).nonzero().squeeze(1)
        return a, p[a], a, n[a]


class BatchHardMiner(BatchEasyHardMiner):
    """The farthest positive and the nearest negative of every anchor that has both: triplets."""

    def __init__(
        self,
        *,
        allowed_pos_range: tuple[float, float] | None = None,
        allowed_neg_range: tuple[float, float] | None = None,
        distance: Any = None,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__(
            self.HARD,
            self.HARD,
            allowed_pos_range,
            allowed_neg_range,
            distance=distance,
            collect_stats=collect_stats,
        )

    def _mine(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        a, p, _, n = super()._mine(batch)
        return a, p, n


class TripletMarginMiner(_Miner):
    """All triplets inside the margin ("all"), those of them with the negative nearer ("hard") or farther
    ("semihard") than the positive, or all others ("easy"); plain torch in chunks of anchors."""

    _shown = ("margin", "type_of_triplets")

    def __init__(
        self,
        margin: float = 0.2,
        type_of_triplets: str = "all",
        *,
        distance: Any = None,
        collect_stats: bool | None = None,
    ) -> None:
        super().__init__(distance=distance, collect_stats=collect_stats)
        name = type(self).__name__
        choice(name, "type_of_triplets", type_of_triplets, ("all", "hard", "semihard", "easy"))
        self.margin = margin_value(name, "margin", margin)
        self.type_of_triplets = type_of_triplets

    def _mine(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return _mining.triplets_within(
            batch, self.type_of_triplets, margin=self.margin, distance=self._distance.name
        )


# ---- losses ------------------------------------------------------------------------------------------------


class _Loss(_Module):
    def __init__(
        self,
        *,
        distance: Any = None,
        reducer: Any = None,
        collect_stats: bool | None = None,
        embedding_regularizer: None = None,
        embedding_reg_weight: float = 1,
    ) -> None:
        super().__init__(distance, collect_stats)
        name = type(self).__name__
        if embedding_regularizer is not None:
            raise error(ValueError, name, "embedding_regularizer", "None", describe(embedding_regularizer))
        self.reduction = _reduction_of(name, reducer)
        self.reducer = reducer

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """`indices_tuple`: triplets or pairs as miners give them, in place of all that the labels form."""
        if indices_tuple is None and labels is None:
            raise error(ValueError, type(self).__name__, "labels", "given without indices_tuple", "None")
        if indices_tuple is None:
            return self._all(self._batch(embeddings, labels, ref_emb, ref_labels))
        if len(indices_tuple) not in (3, 4) or not all(isinstance(i, Tensor) for i in indices_tuple):
            got = f"{len(indices_tuple)} of {', '.join(sorted({describe(i) for i in indices_tuple}))}"
            raise error(TypeError, type(self).__name__, "indices_tuple", "three or four tensors", got)
        batch = self._batch(embeddings, None, ref_emb, None)
        return self._listed(batch, tuple(i.to(embeddings.device).long() for i in indices_tuple))

    def _all(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def _listed(self, batch: Batch, indices: tuple[Tensor, ...]) -> Tensor:
        raise NotImplementedError

    def _with_copies(self, batch: Batch) -> Tensor:
        """The loss of all but the pairs of an anchor with `batch.own`, which is a copy of it."""
        return self._all(batch)

    def _reduced(self, batch: Batch, losses: Tensor) -> Tensor:
        """NaN where an embedding is not finite, chosen or not, as everywhere in this package."""
        both = _pairs.nothing(batch.embeddings) + _pairs.nothing(batch.ref_embeddings)
        return _pairs.reduce(losses, self.reduction) + both

    def _distances(self, x: Tensor, ref: Tensor, *lists: tuple[Tensor, Tensor]) -> list[Tensor]:
        return _pairs.listed_distances(x, ref, lists, self._distance.name)


class TripletMarginLoss(_Loss):
    """relu(d_ap - d_an + margin), or softplus when `smooth_loss`; `swap`: d_an or d_pn, what is smaller.

    All triplets are the fused `batch_all_triplet_loss`; with `swap` or `smooth_loss` plain torch in chunks of
    anchors. `triplets_per_anchor`: "all", or how many to draw for each anchor, from torch's generator.
    """

    _shown = ("margin", "swap", "smooth_loss", "triplets_per_anchor", "reduction")

    def __init__(
        self,
        margin: float = 0.05,
        swap: bool = False,
        smooth_loss: bool = False,
        triplets_per_anchor: int | str = "all",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        name = type(self).__name__
        self.margin = margin_value(name, "margin", margin)
        if triplets_per_anchor != "all" and not (
            isinstance(triplets_per_anchor, int) and triplets_per_anchor > 0
        ):
            expected = '"all" or an integer > 0'
            raise error(ValueError, name, "triplets_per_anchor", expected, describe(triplets_per_anchor))
        self.swap, self.smooth_loss = bool(swap), bool(smooth_loss)
        self.triplets_per_anchor = triplets_per_anchor

    def _all(self, batch: Batch) -> Tensor:
        if self.triplets_per_anchor != "all":
            return self._listed(batch, _pairs.sampled_triplets(batch, self.triplets_per_anchor))
        if batch.fused and not (self.swap or self.smooth_loss):
            return functional.batch_all_triplet_loss(
                *batch.arguments,
                margin=self.margin,
                distance=self._distance.name,
                reduction=self.reduction,
            )
        return self._in_chunks(batch)

    def _with_copies(self, batch: Batch) -> Tensor:
        return self._in_chunks(batch)

    def _in_chunks(self, batch: Batch) -> Tensor:
        return _pairs.all_triplets_loss(
            batch, self._loss, swap=self.swap, distance=self._distance.name, reduction=self.reduction
        )

    def _listed(self, batch: Batch, indices: tuple[Tensor, ...]) -> Tensor:
        a, p, n = _pairs.as_triplets(indices)
        x, ref = batch.embeddings, batch.ref_embeddings
        d_ap, d_an = self._distances(x, ref, (a, p), (a, n))
        if self.swap:
            d_an = d_an.minimum(*self._distances(ref, ref, (p, n)))
        return self._reduced(batch, self._loss(d_ap - d_an))

    def _loss(self, gap: Tensor) -> Tensor:
        violation = gap + self.margin
        return nn.functional.softplus(violation) if self.smooth_loss else violation.relu()


class ContrastiveLoss(_Loss):
    """relu(d - pos_margin) of positive pairs, reduced, plus relu(neg_margin - d) of negative pairs, reduced.

    With a similarity s: relu(pos_margin - s) and relu(s - neg_margin), margins up to 1. All pairs are the
    fused `batch_contrastive_loss` (twice for a MeanReducer, which has two denominators).
    """

    _shown = ("pos_margin", "neg_margin", "reduction")

    def __init__(self, pos_margin: float = 0, neg_margin: float = 1, **options: Any) -> None:
        super().__init__(**options)
        name = type(self).__name__
        self.pos_margin, self.neg_margin = pos_margin, neg_margin
        self._margins = tuple(
            self._as_distance(name, argument, value)
            for argument, value in (("pos_margin", pos_margin), ("neg_margin", neg_margin))
        )

    def _as_distance(self, name: str, argument: str, margin: float) -> float:
        """A margin in units of distance: where relu(s - m) is relu((1 - m) - d)."""
        if not self._distance.similarity:
            return margin_value(name, argument, margin)
        if not margin <= 1:
            raise error(ValueError, name, argument, "at most 1 with a similarity", describe(margin))
        return margin_value(name, argument, 1 - margin)

    def _all(self, batch: Batch) -> Tensor:
        return self._fused(batch) if batch.fused else self._in_chunks(batch)

    def _with_copies(self, batch: Batch) -> Tensor:
        if self._distance.similarity and (batch.embeddings == 0).all(dim=1).any():
            return self._in_chunks(batch)  # a zero vector is not at distance 0 from its copy
        # The pair with the copy costs nothing at distance 0; bit for bit the same row makes sure of that.
        copied = batch.ref_embeddings.index_copy(0, batch.own, batch.embeddings.detach())
        return self._fused(batch._replace(ref_embeddings=copied), copies=len(batch.own))

    def _fused(self, batch: Batch, copies: int = 0) -> Tensor:
        def loss(pos_margin: float, neg_margin: float, **options: Any):
            return functional.batch_contrastive_loss(
                *batch.arguments,
                pos_margin=pos_margin,
                neg_margin=neg_margin,
                distance=self._distance.name,
                **options,
            )

        pos_margin, neg_margin = self._margins
        if self.reduction != "mean":
            return loss(pos_margin, neg_margin, reduction=self.reduction)
        positive = loss(pos_margin, 0.0, reduction="sum", return_stats=True)
        negative = loss(_FAR, neg_margin, reduction="sum", return_stats=True)
        pairs = (positive.positive_pairs - copies).clamp(min=1), negative.negative_pairs.clamp(min=1)
        return positive.loss / pairs[0] + negative.loss / pairs[1]

    def _in_chunks(self, batch: Batch) -> Tensor:
        return _pairs.all_pairs_loss(
            batch,
            self._positive,
            self._negative,
            distance=self._distance.name,
            reduction=self.reduction,
        )

    def _listed(self, batch: Batch, indices: tuple[Tensor, ...]) -> Tensor:
        a, p, b, n = _pairs.as_pairs(indices)
        x, ref = batch.embeddings, batch.ref_embeddings
        d_p, d_n = self._distances(x, ref, (a, p), (b, n))
        return self._reduced(batch, self._positive(d_p)) + self._reduced(batch, self._negative(d_n))

    def _positive(self, d: Tensor) -> Tensor:
        return (d - self._margins[0]).relu()

    def _negative(self, d: Tensor) -> Tensor:
        return (self._margins[1] - d).relu()


# ---- memory ------------------------------------------------------------------------------------------------


class CrossBatchMemory(nn.Module):
    """The loss of a batch against a queue of the latest `memory_size` embeddings, itself included.

    Source: Wang, Zhang, Huang, Scott, "Cross-Batch Memory for Embedding Learning" (2020).

    Args:
        loss: a loss of this module, or any that is called as they are.
        embedding_size: D.
        memory_size: rows of the queue.
        miner: a miner of this module or one that is called as they are; None: all pairs or triplets, which
            the losses of this module take without a list of them.

    The buffers `embedding_memory` and `label_memory` and hence the state_dict are theirs; as theirs, it does
    not hold how full the queue is.

    Where 2.9 is wrong this is not: with one row per batch an anchor is not compared with itself, and an
    `enqueue_mask` that selects nothing does not declare the queue full.
    """

    def __init__(
        self, loss: nn.Module, embedding_size: int, memory_size: int = 1024, miner: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner
        self.embedding_size, self.memory_size = embedding_size, memory_size
        self.reset_queue()

    def reset_queue(self) -> None:
        self.register_buffer("embedding_memory", torch.zeros(self.memory_size, self.embedding_size))
        self.register_buffer("label_memory", torch.zeros(self.memory_size, dtype=torch.int64))
        self.has_been_filled = False
        self.queue_idx = 0

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """Puts the batch into the queue, then compares it with the queue less every anchor's own row.

        indices_tuple: more pairs or triplets; as theirs, positives and negatives are rows of the queue.
        enqueue_mask: bool [N]; selected rows go into the queue, the others are the anchors.
        """
        name = type(self).__name__
        if enqueue_mask is not None:
            if indices_tuple is not None:
                raise error(ValueError, name, "indices_tuple", "None with an enqueue_mask", "a tuple")
            if enqueue_mask.dtype is not torch.bool or enqueue_mask.shape != embeddings.shape[:1]:
                expected = f"bool of shape [N]=[{len(embeddings)}]"
                raise error(ValueError, name, "enqueue_mask", expected, describe(enqueue_mask))
        labels = labels.to(embeddings.device)
        self.embedding_memory = self.embedding_memory.to(embeddings.device, embeddings.dtype)
        self.label_memory = self.label_memory.to(labels.device, labels.dtype)
        if enqueue_mask is None:
            self.add_to_memory(embeddings, labels, len(embeddings))
            own = self.curr_batch_idx
        else:
            self.add_to_memory(embeddings[enqueue_mask], labels[enqueue_mask], int(enqueue_mask.sum()))
            embeddings, labels, own = embeddings[~enqueue_mask], labels[~enqueue_mask], None
        filled = self.memory_size if self.has_been_filled else self.queue_idx
        # Copies: the next call overwrites the queue, perhaps before this one's backward.
        memory = self.embedding_memory[:filled].clone(), self.label_memory[:filled].clone()

        if self.miner is None and indices_tuple is None and isinstance(self.loss, _Loss):
            batch = self.loss._batch(embeddings, labels, *memory, own)
            return self.loss._all(batch) if own is None else self.loss._with_copies(batch)
        if self.miner is None:
            mined = _pairs.all_pairs(Batch(embeddings, _integers(labels, embeddings), *memory, own))
        else:
            mined = tuple(self.miner(embeddings, labels, *memory))
            mined = mined if own is None else _pairs.without_own(mined, own)
        if indices_tuple is not None:
            convert = _pairs.as_triplets if len(mined) == 3 else _pairs.as_pairs
            given = convert(tuple(i.to(embeddings.device) for i in indices_tuple))
            mined = tuple(torch.cat(both) for both in zip(mined, given, strict=True))
        return self.loss(embeddings, labels, mined, *memory)

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int) -> None:
        """Overwrites the oldest `batch_size` rows of the queue."""
        if batch_size > self.memory_size:
            expected = f"at most memory_size={self.memory_size} rows at a time"
            raise error(ValueError, type(self).__name__, "embeddings", expected, str(batch_size))
        end = self.queue_idx + batch_size
        self.curr_batch_idx = torch.arange(self.queue_idx, end, device=labels.device) % self.memory_size
        self.embedding_memory[self.curr_batch_idx] = embeddings.detach()
        self.label_memory[self.curr_batch_idx] = labels.detach()
        self.has_been_filled |= end >= self.memory_size
        self.queue_idx = end % self.memory_size


# ---- arguments ---------------------------------------------------------------------------------------------


def _distance_of(name: str, distance: Any) -> _Distance:
    """Reads one of their distance objects; a subclass may measure anything, so the class is told by name."""
    if distance is None:
        return _Distance("euclidean", normalized=True, similarity=False)
    kind, p, power, normalized = (
        type(distance).__name__,
        getattr(distance, "p", None),
        getattr(distance, "power", None),
        bool(getattr(distance, "normalize_embeddings", False)),
    )
    if kind == "LpDistance" and p == 2 and power in (1, 2):
        return _Distance("euclidean" if power == 1 else "sqeuclidean", normalized, similarity=False)
    if kind in ("CosineSimilarity", "DotProductSimilarity") and p == 2 and power == 1 and normalized:
        # Not normalised here: a zero vector keeps its distance and has no gradient.
        return _Distance("cosine", normalized=False, similarity=True)
    expected = (
        "None, LpDistance with p=2 and power 1 or 2, CosineSimilarity, or DotProductSimilarity of normalized"
        " embeddings, with power=1"
    )
    got = f"{kind} with p={p}, power={power}, normalize_embeddings={normalized}"
    raise error(ValueError, name, "distance", expected, got)


def _reduction_of(name: str, reducer: Any) -> str:
    """Reads one of their reducers, likewise."""
    kind = "AvgNonZeroReducer" if reducer is None else type(reducer).__name__
    low, high = getattr(reducer, "low", 0), getattr(reducer, "high", None)
    if kind in _REDUCTIONS and (low, high) == (0, None):
        return _REDUCTIONS[kind]
    expected = "None, AvgNonZeroReducer, ThresholdReducer with low=0 and no high, MeanReducer or SumReducer"
    got = f"{kind} with low={low}, high={high}" if kind == "ThresholdReducer" else describe(reducer)
    raise error(ValueError, name, "reducer", expected, got)


def _check(
    name: str, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor, ref_labels: Tensor | None
) -> None:
    if labels is not None:
        _checks.batch_hard(name, embeddings, labels, ref_emb, ref_labels, distance="euclidean")
        return
    check_embeddings(name, "embeddings", embeddings, "[N, D]")
    check_embeddings(name, "ref_emb", ref_emb, "[M, D]")
    check_columns(name, "ref_emb", ref_emb, "M", "embeddings", embeddings)
    match_dtypes(name, "embeddings", embeddings, "ref_emb", ref_emb, (embeddings.dtype,))


def _integers(labels: Tensor | None, embeddings: Tensor) -> Tensor | None:
    """On the device of the embeddings, in int64; floating labels are left to be refused."""
    if labels is None:
        return None
    labels = labels.to(embeddings.device)
    return labels if labels.is_floating_point() else labels.long()
