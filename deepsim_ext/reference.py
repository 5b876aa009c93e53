"""Every function of the package in plain torch: the same names, signatures, values, gradients and errors.

Written to be read, not to be fast: it builds the N x N matrices. It runs on any device, needs nothing
compiled, and is what the compiled functions are checked against. Mining and the loss of mined triplets are
apart (`mine_hardest`, `indexed_triplet_loss`), so that the loss of given triplets can be differentiated to
any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from . import _checks
from .results import BatchHardResult

__all__ = [
    "batch_hard_mine",
    "batch_hard_triplet_loss",
    "content_loss",
    "contrastive_loss",
    "gram_matrix",
    "style_loss",
]


# ---- batch-hard triplet loss -------------------------------------------------------------------------------


def batch_hard_mine(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Hardest positive and hardest negative of every anchor that has both.

    Source: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017),
    eq. 5.

    Args:
        embeddings: [N, D] with D >= 1; float32, float64, bfloat16 or float16.
        labels: int64 [N].
        ref_embeddings, ref_labels: [M, D] and int64 [M], the rows to choose from; dtype of `embeddings` or,
            under autocast, a mix that goes to the widest. None, or `embeddings` itself: choose from the
            batch, where no anchor is its own positive; `ref_labels` then has no effect.
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).

    Returns:
        (anchors, positives, negatives), int64 of one length, anchors ascending. Ties go to the lowest index.
        With a NaN or inf in the embeddings nothing is chosen.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance, or shapes or devices that do not go together.
    """
    arguments = _checks.batch_hard(
        "batch_hard_mine", embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    positives, negatives = mine_hardest(*arguments, distance=distance)
    anchors = torch.nonzero(positives >= 0).squeeze(1)
    return anchors, positives[anchors], negatives[anchors]


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin: float = 0.2,
    soft: bool = False,
    distance: str = "euclidean",
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | BatchHardResult:
    """Triplet loss of every anchor with its hardest positive and hardest negative.

    `relu(d_ap - d_an + margin)`, or `softplus(d_ap - d_an)` when `soft`. An anchor without a positive or
    without a negative is not valid and costs nothing. Source: Hermans, Beyer, Leibe, "In Defense of the
    Triplet Loss for Person Re-Identification" (2017), eq. 5; the soft margin is of its section 2.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, distance: as in `batch_hard_mine`.
        margin: finite, >= 0, in units of the distance; not used when `soft`.
        soft: the soft margin.
        reduction: "mean" over valid anchors, "mean_nonzero" over anchors whose loss is > 0, "sum", or "none"
            for [N] with 0 at anchors that are not valid. The mean of nothing is 0.
        return_stats: return a `BatchHardResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar, or [N] for "none"; float32, or float64 for float64 input. Half inputs are computed in float32.
        Gradients flow into both embeddings; that of a Euclidean distance is 0 at 0, and that of a cosine
        distance is 0 at a zero vector. A NaN or inf in an embedding makes the loss NaN.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown distance or reduction, negative or non-finite margin, or shapes or devices that do
            not go together.
    """
    function = "batch_hard_triplet_loss"
    margin = _checks.batch_hard_options(
        function, margin=margin, soft=soft, distance=distance, reduction=reduction, return_stats=return_stats
    )
    arguments = _checks.batch_hard(
        function, embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    positives, negatives = mine_hardest(*arguments, distance=distance)
    x, refs = arguments.embeddings, arguments.ref_embeddings
    per_anchor, d_ap, d_an = _triplet_terms(
        x, refs, positives, negatives, margin=margin, soft=soft, distance=distance
    )
    valid = positives >= 0
    loss = _nan_unless_finite(_reduce(per_anchor, valid, reduction), x, refs)
    if not return_stats:
        return loss
    valid_anchors = valid.sum()
    count = valid_anchors.clamp(min=1).to(per_anchor.dtype)
    return BatchHardResult(
        loss=loss,
        valid_anchors=valid_anchors,
        active_fraction=(per_anchor > 0).sum() / count,
        mean_d_ap=_nan_unless_finite(d_ap.detach().sum() / count, x, refs),
        mean_d_an=_nan_unless_finite(d_an.detach().sum() / count, x, refs),
    )


@torch.no_grad()
def mine_hardest(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    *,
    distance: str,
) -> tuple[Tensor, Tensor]:
    """Dense form of `batch_hard_mine` on checked arguments: (positives, negatives), int64 [N].

    Both are -1 for an anchor that lacks either. Distances are float64 direct differences: the exact answer
    for any input dtype.
    """
    self_form = ref_embeddings is None
    x = embeddings.double()
    distances = _pairwise(x, x if self_form else ref_embeddings.double(), distance)
    same = labels[:, None] == (labels if self_form else ref_labels)[None, :]
    allowed = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device) if self_form else same
    positives, negatives = _first_argmax(distances, allowed), _first_argmax(-distances, ~same)
    valid = (positives >= 0) & (negatives >= 0) & _all_finite(embeddings, ref_embeddings)
    return torch.where(valid, positives, -1), torch.where(valid, negatives, -1)


def indexed_triplet_loss(
    embeddings: Tensor,
    ref_embeddings: Tensor | None,
    positives: Tensor,
    negatives: Tensor,
    *,
    margin: float,
    soft: bool,
    distance: str,
    reduction: str,
) -> Tensor:
    """The loss of `batch_hard_triplet_loss` for given triplets; differentiable to any order.

    Args:
        embeddings: [N, D], the anchors.
        ref_embeddings: [M, D], or None for `embeddings`.
        positives, negatives: integer [N], rows of `ref_embeddings`; both -1 for an anchor that is not valid.
        margin, soft, distance, reduction: as in `batch_hard_triplet_loss`; nothing is checked.
    """
    per_anchor, _, _ = _triplet_terms(
        embeddings, ref_embeddings, positives, negatives, margin=margin, soft=soft, distance=distance
    )
    return _nan_unless_finite(_reduce(per_anchor, positives >= 0, reduction), embeddings, ref_embeddings)


def _triplet_terms(
    embeddings: Tensor,
    ref_embeddings: Tensor | None,
    positives: Tensor,
    negatives: Tensor,
    *,
    margin: float,
    soft: bool,
    distance: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, d_ap and d_an of every anchor, [N] each, 0 at anchors that are not valid."""
    x = embeddings.to(_checks.compute_dtype(embeddings))
    refs = x if ref_embeddings is None else ref_embeddings.to(x.dtype)
    refs = torch.cat([refs, refs.new_zeros(1, refs.shape[1])])  # where index -1 lands, even if M = 0
    d_ap = _rowwise(x, refs[positives], distance)
    d_an = _rowwise(x, refs[negatives], distance)
    # Beyond the threshold softplus(z) is taken to be z: at 40, exp(-40) is below the rounding of a float64.
    loss = torch.nn.functional.softplus(d_ap - d_an, threshold=40) if soft else (d_ap - d_an + margin).relu()
    valid = positives >= 0
    return torch.where(valid, loss, 0), torch.where(valid, d_ap, 0), torch.where(valid, d_an, 0)


def _reduce(per_anchor: Tensor, valid: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return per_anchor
    if reduction == "sum":
        return per_anchor.sum()
    counted = per_anchor > 0 if reduction == "mean_nonzero" else valid
    return per_anchor.sum() / counted.sum().clamp(min=1)


def _all_finite(*tensors: Tensor | None) -> Tensor:
    """Whether no element of `tensors` is NaN or inf: a bool scalar on the device, without a sync."""
    return torch.stack([x.isfinite().all() for x in tensors if x is not None]).all()


def _nan_unless_finite(x: Tensor, *tensors: Tensor | None) -> Tensor:
    return x + torch.where(_all_finite(*tensors), torch.zeros_like(x), torch.nan)


def _pairwise(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """[N, M] distances between the rows of x [N, D] and y [M, D], each a direct difference."""
    if distance == "cosine":
        zero = _zero_rows(x)[:, None] | _zero_rows(y)[None, :]
        return torch.where(zero, 1.0, _pairwise(_unit(x), _unit(y), "sqeuclidean") / 2)
    d = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return d if distance == "euclidean" else d.square()


def _rowwise(a: Tensor, b: Tensor, distance: str) -> Tensor:
    """[N] distances between the rows of a and b, [N, D] each, safe to differentiate at 0."""
    if distance == "cosine":  # of unit vectors, 1 - a.b = |a - b|^2 / 2, which does not cancel
        return torch.where(
            _zero_rows(a) | _zero_rows(b), 1.0, _rowwise(_unit(a), _unit(b), "sqeuclidean") / 2
        )
    squared = (a - b).square().sum(dim=1)
    return _sqrt(squared) if distance == "euclidean" else squared


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose gradients, of any order, are 0 at 0: there, sqrt itself never sees the 0."""
    return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt())


def _zero_rows(x: Tensor) -> Tensor:
    return x.square().sum(dim=1) == 0


def _unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a zero row stays zero."""
    squared = x.square().sum(dim=1, keepdim=True)
    return x / torch.where(squared == 0, 1.0, squared).sqrt()


def _first_argmax(values: Tensor, allowed: Tensor) -> Tensor:
    """Column of each row's largest allowed value in [N, M], the lowest on ties; -1 where none is allowed."""
    n, m = values.shape
    if m == 0:
        return torch.full((n,), -1, dtype=torch.int64, device=values.device)
    best = torch.where(allowed, values, -torch.inf).amax(dim=1, keepdim=True)
    columns = torch.arange(m, device=values.device)
    first = torch.where(allowed & (values == best), columns, m).amin(dim=1)
    return torch.where(first == m, -1, first)


# ---- contrastive loss --------------------------------------------------------------------------------------


def contrastive_loss(
    x1: Tensor, x2: Tensor, y: Tensor, *, margin: float = 1.0, reduction: str = "mean"
) -> Tensor:
    """Contrastive loss `y d^2 + (1 - y) relu(margin - d)^2` of given pairs.

    Arguments, result and errors are those of `deepsim_ext.functional.contrastive_loss`.
    """
    x1, x2, y, margin = _checks.contrastive("contrastive_loss", x1, x2, y, margin=margin, reduction=reduction)
    dtype = _checks.compute_dtype(x1)
    d = _rowwise(x1.to(dtype), x2.to(dtype), "euclidean")
    d2 = _rowwise(x1.to(dtype), x2.to(dtype), "sqeuclidean")
    loss = y * d2 + (1 - y) * (margin - d).relu() ** 2
    loss = torch.where(d2.isfinite(), loss, torch.nan)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" or len(loss) == 0 else loss.mean()


# ---- style transfer ----------------------------------------------------------------------------------------


def gram_matrix(features: Tensor, *, normalize: str | float = "chw") -> Tensor:
    """Gram matrices of feature maps: `scale * F F^T` per sample, F = features as [C, N], N = spatial size.

    Source: Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks" (2016), eq. 3,
    which is normalize="none".

    Args:
        features: [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0; float32, float64, bfloat16
            or float16.
        normalize: what to divide by: "none" (1), "hw" (N), "chw" (C N), "bchw" (B C N), or a positive number.

    Returns:
        [B, C, C]; float32, or float64 for float64 input. Half inputs are multiplied in float32.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown or non-positive `normalize`, or features of the wrong shape.
    """
    _checks.gram_matrix("gram_matrix", features, normalize=normalize)
    return _gram(features, normalize)


def style_loss(
    features: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    normalize: str | float = "chw",
    reduction: str = "mean",
    distance: str = "l2",
) -> Tensor:
    """Distance between the Gram matrices of `features` and `target`, summed over layers.

    Source: Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks" (2016), eq. 4
    and 5, which are normalize="none", reduction="gatys".

    Args:
        features: [B, C, *spatial] as in `gram_matrix`, or a list or tuple of them, one per layer.
        target: the same number of Gram matrices [C, C], [1, C, C] or [B, C, C], in the dtype that
            `gram_matrix` returns or that of `features`. Under autocast other dtypes go to the widest.
        weights: None (1 each) or one finite number per layer.
        normalize: as in `gram_matrix`.
        reduction: within a layer, "mean" (times 1 / (B C^2)), "sum" (times 1) or "gatys" (times
            1 / (4 C^2 N^2)); sums run over B too.
        distance: "l2" for squared, "l1" for absolute differences.

    Returns:
        Scalar; float32, or float64 for float64 input. Differentiable in `features` and `target`.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: an unknown name, no layer, or shapes, devices or lengths that do not go together.
    """
    layers = _checks.style(
        "style_loss",
        features,
        target,
        weights=weights,
        normalize=normalize,
        reduction=reduction,
        distance=distance,
    )
    total = 0.0
    for layer in layers:
        b, c = layer.features.shape[:2]
        n = layer.features.shape[2:].numel()
        factor = {"mean": 1 / (b * c * c), "sum": 1.0, "gatys": 1 / (4 * c * c * n * n)}[reduction]
        difference = _gram(layer.features, normalize) - layer.target
        distances = difference.square() if distance == "l2" else difference.abs()
        total = total + layer.weight * factor * distances.sum()
    return total


def _gram(features: Tensor, normalize: str | float) -> Tensor:
    f = features.flatten(start_dim=2).to(_checks.compute_dtype(features))
    b, c, n = f.shape
    divisors = {"none": 1, "hw": n, "chw": c * n, "bchw": b * c * n}
    divisor = divisors[normalize] if isinstance(normalize, str) else normalize
    device = f.device.type
    can_autocast = torch.amp.is_autocast_available(device)
    # Autocast would round the factors to half.
    with torch.autocast(device, enabled=False) if can_autocast else nullcontext():
        return (f @ f.mT) / divisor


def content_loss(
    features: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Squared difference of activations, summed over layers.

    Arguments, result and errors are those of `deepsim_ext.functional.content_loss`.
    """
    total = 0.0
    for layer in _checks.content("content_loss", features, target, weights=weights, reduction=reduction):
        dtype = _checks.compute_dtype(layer.features)
        difference = layer.features.to(dtype) - layer.target.to(dtype)
        total = total + layer.factor * (difference**2).sum()
    return total
