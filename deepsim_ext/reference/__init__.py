"""Every function of the package in plain torch: the same names, signatures, values, gradients and errors.

Written to be read, not to be fast: it builds matrices of all pairs, and tensors of all triplets. It runs on
any device, needs nothing compiled, and is what the compiled functions are checked against.

Besides the public functions there are the parts that a gradient of a gradient needs, on arguments that are
checked already: `mine_triplets` and `indexed_triplet_loss`, which keep the choice of triplets and their loss
apart, and `dense_batch_all`, `dense_semi_hard` and `dense_contrastive`. The losses can be differentiated to
any order. `positive_distances`, `batch_all_negatives` and `semi_hard_negatives` are what the ops of these
names do on CUDA, which has no kernels for them, in bounded memory; `batch_hard_extremes`, `pair_distances`
and its gradient are what the ops of these names are checked against.
"""

from __future__ import annotations

from .batch_all import batch_all_triplet_loss
from .batch_all import dense_batch_all as dense_batch_all
from .batch_all_negatives import batch_all_negatives as batch_all_negatives
from .batch_contrastive import batch_contrastive_loss
from .batch_contrastive import dense_contrastive as dense_contrastive
from .batch_hard import batch_hard_mine, batch_hard_triplet_loss
from .batch_hard import indexed_triplet_loss as indexed_triplet_loss
from .batch_hard import mine_triplets as mine_triplets
from .batch_hard_extremes import batch_hard_extremes as batch_hard_extremes
from .content import content_loss
from .given_rows import contrastive_loss, triplet_margin_loss
from .neighbors import nearest_neighbors
from .pair_distances import pair_distances as pair_distances
from .pair_distances import pair_distances_backward as pair_distances_backward
from .positive_distances import positive_distances as positive_distances
from .semi_hard import batch_semi_hard_triplet_loss
from .semi_hard import dense_semi_hard as dense_semi_hard
from .semi_hard_negatives import semi_hard_negatives as semi_hard_negatives
from .style import gram_matrix, style_loss
from .total_variation import total_variation_loss

__all__ = [
    "batch_all_triplet_loss",
    "batch_contrastive_loss",
    "batch_hard_mine",
    "batch_hard_triplet_loss",
    "batch_semi_hard_triplet_loss",
    "content_loss",
    "contrastive_loss",
    "gram_matrix",
    "nearest_neighbors",
    "style_loss",
    "total_variation_loss",
    "triplet_margin_loss",
]
