"""Mining over the batches of all ranks of a process group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import _checks, batch_hard
from . import _batch_hard
from ._agree import group_of
from ._batches import exchange, gather_rows
from .loss import MODES, is_gathered


@torch.no_grad()
def batch_hard_mine(
    embeddings: Tensor,
    labels: Tensor,
    *,
    positive: str = "hard",
    negative: str = "hard",
    distance: str = "euclidean",
    process_group: ProcessGroup | None = None,
    mode: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`deepsim_ext.batch_hard_mine` of this rank's anchors among the rows of all ranks.

    Every rank calls it with its own rows, of any number, also none. The union of the batches has its rows in
    the order of the ranks; the triplets of all ranks together, in that order, are those of the union.

    Args:
        embeddings, labels, positive, negative, distance: as in `deepsim_ext.batch_hard_mine`, [n, D] and
            int64 [n] of this rank.
        process_group: None for the default group; without one that is initialised, and in a group of one, it
            is the plain function.
        mode: as in `DistributedLoss`.

    Returns:
        (anchors, positives, negatives): int64 of one length, rows of the union, anchors ascending.

    Raises:
        TypeError, ValueError: as the plain function on this rank, and on all ranks where D, dtypes, kinds of
            device or options are not the same.
        RuntimeError: another rank's arguments are wrong; names the rank.
    """
    function = "batch_hard_mine"
    _checks.mining_strategies(function, positive=positive, negative=negative)
    _checks.choice(function, "mode", mode, MODES)
    strategies = {"positive": positive, "negative": negative, "distance": distance}
    group = group_of(function, process_group)
    if group is None:
        return batch_hard.batch_hard_mine(embeddings, labels, **strategies)

    def check() -> tuple[Tensor, Tensor]:
        return _checks.batch_hard(function, embeddings, labels, None, None, distance=distance)[:2]

    x, batches = exchange(function, group, strategies | {"mode": mode}, check)
    if is_gathered(mode, x, batches):
        triplets = batch_hard.batch_hard_mine(gather_rows(x, batches), batches.labels, **strategies)
        rows = batches.rows(batches.rank)
        own = (triplets[0] >= rows.start) & (triplets[0] < rows.stop)
        return tuple(indices[own] for indices in triplets)
    mined = _batch_hard.mine(x, labels, batches, **strategies)
    anchors = torch.nonzero(mined.positives >= 0).squeeze(1)
    return anchors + batches.offset, mined.positives[anchors], mined.negatives[anchors]
