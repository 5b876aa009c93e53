"""The batch triplet losses of sentence-transformers 6 over `deepsim_ext.functional`.

Names, constructor arguments, defaults and calls are theirs: `loss(sentence_features, labels)` with a model
that gives {"sentence_embedding": [N, D]} for the first of the features, and integer labels [N]. Embeddings
are not normalised. The result is a scalar in float32, or in float64 for float64 embeddings.

`distance_metric` is euclidean_distance (also by its old name, eucledian_distance) or cosine_distance of
BatchHardTripletLossDistanceFunction, theirs or the one below: told by its name, nothing is imported from
there. Any other function, and a negative margin, is an error that names the argument.

Where theirs are wrong these are not: Euclidean distances do not cancel far from the origin, and the gradient
of a cosine at a zero vector is 0. One corner is not followed: theirs has a zero vector at cosine distance 1
from itself, which shows where a row has no positive or no negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._checks.options import margin_value
from .._checks.texts import error
from ..reference.distances import pairwise

__all__ = [
    "BatchAllTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchHardTripletLoss",
    "BatchHardTripletLossDistanceFunction",
    "BatchSemiHardTripletLoss",
]


class BatchHardTripletLossDistanceFunction:
    """Distances between all rows of embeddings [N, D]. The losses only ask which one it is."""

    @staticmethod
    def cosine_distance(embeddings: Tensor) -> Tensor:
        return pairwise(embeddings, embeddings, "cosine")

    @staticmethod
    def euclidean_distance(embeddings: Tensor, squared: bool = False) -> Tensor:
        return pairwise(embeddings, embeddings, "sqeuclidean" if squared else "euclidean")

    eucledian_distance = euclidean_distance


_DISTANCES = {
    "BatchHardTripletLossDistanceFunction.euclidean_distance": "euclidean",
    "BatchHardTripletLossDistanceFunction.eucledian_distance": "euclidean",
    "BatchHardTripletLossDistanceFunction.cosine_distance": "cosine",
}


class _BatchLoss(nn.Module):
    """A model and what is computed from its embeddings."""

    def __init__(self, model: nn.Module, distance_metric: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        name = getattr(distance_metric, "__qualname__", type(distance_metric).__name__)
        if name not in _DISTANCES:
            expected = "euclidean_distance or cosine_distance of BatchHardTripletLossDistanceFunction"
            raise error(ValueError, type(self).__name__, "distance_metric", expected, name)
        self.sentence_embedder = model
        self.distance_metric = distance_metric
        self._distance = _DISTANCES[name]

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        embeddings = self.sentence_embedder(sentence_features[0])["sentence_embedding"]
        return self.compute_loss_from_embeddings([embeddings], labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """embeddings: a list of one [N, D]; labels: integers, N of them in any shape."""
        labels = labels.reshape(-1)
        return self._loss(embeddings[0], labels if labels.is_floating_point() else labels.long())

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def get_config_dict(self) -> dict[str, Any]:
        return {"distance_metric": self.distance_metric.__name__}


class _MarginLoss(_BatchLoss):
    def __init__(
        self,
        model: nn.Module,
        distance_metric: Callable[[Tensor], Tensor] = BatchHardTripletLossDistanceFunction.euclidean_distance,
        margin: float = 5,
    ) -> None:
        super().__init__(model, distance_metric)
        self._margin = margin_value(type(self).__name__, "margin", margin)

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), "margin": self._margin}


def _batch_hard(x: Tensor, labels: Tensor, equal: float, **options: Any) -> Tensor:
    """Mean over all rows: one without a positive has d_ap = 0, and in a batch of one class d_ap = d_an.

    `equal` is the loss where d_ap = d_an. The rows are given once more as references: so every row is its own
    positive at distance 0, which matters where there is no other.
    """
    result = functional.batch_hard_triplet_loss(x, labels, x.view_as(x), labels, return_stats=True, **options)
    one_class = (result.valid_anchors == 0) & (len(x) > 0)
    return torch.where(one_class, result.loss + equal, result.loss)


class BatchHardTripletLoss(_MarginLoss):
    """Mean over all rows of relu(d_ap - d_an + margin), by the hardest positive and negative."""

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return _batch_hard(x, labels, self._margin, margin=self._margin, distance=self._distance)


class BatchHardSoftMarginTripletLoss(_BatchLoss):
    """Mean over all rows of log(1 + exp(d_ap - d_an)), by the hardest positive and negative."""

    def __init__(
        self,
        model: nn.Module,
        distance_metric: Callable[[Tensor], Tensor] = BatchHardTripletLossDistanceFunction.euclidean_distance,
    ) -> None:
        super().__init__(model, distance_metric)

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return _batch_hard(x, labels, math.log(2), soft=True, distance=self._distance)


class BatchSemiHardTripletLoss(_MarginLoss):
    """Mean over all ordered pairs (a, p) of relu(d_ap - d_an + margin), with the nearest negative that is
    farther than p or, if there is none, the farthest. Asks on the host whether there is one class only."""

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        if len(x) > 1 and (labels == labels[0]).all():
            # Theirs then takes the anchor itself, at distance 0, for the negative.
            d = functional.batch_contrastive_loss(
                x, labels, pos_margin=0.0, neg_margin=0.0, distance=self._distance, reduction="mean"
            )
            return d + self._margin
        return functional.batch_semi_hard_triplet_loss(
            x, labels, margin=self._margin, definition="tfa", distance=self._distance, reduction="mean"
        )


class BatchAllTripletLoss(_MarginLoss):
    """Mean of relu(d_ap - d_an + margin) over all triplets where it is > 0."""

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return functional.batch_all_triplet_loss(
            x, labels, margin=self._margin, distance=self._distance, reduction="mean_nonzero"
        )
