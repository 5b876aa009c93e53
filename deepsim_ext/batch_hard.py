"""Batch-hard mining and triplet loss, and those by other strategies: the functions that people call, and the
ops' shapes and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, reference
from ._autograd import differentiable, register_vmap_by_loop
from .results import TripletLossResult

_ops = torch.ops.deepsim_ext


def batch_hard_mine(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    positive: str = "hard",
    negative: str = "hard",
    distance: str = "euclidean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Hardest positive (the farthest of its label) and negative (the nearest of another) of every anchor.

    Or easier ones. Source: Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person
    Re-Identification" (2017), eq. 5; the other strategies are those of pytorch-metric-learning's
    BatchEasyHardMiner.

    Args:
        embeddings: [N, D] with D >= 1; float32, float64, bfloat16 or float16.
        labels: int64 [N].
        ref_embeddings, ref_labels: [M, D] and int64 [M], the rows to choose from; dtype of `embeddings`
            (under autocast a mix goes to the widest). None, or `embeddings` itself: choose from the batch,
            where no anchor is its own positive; `ref_labels` then has no effect.
        positive: "hard" is the farthest, "easy" the nearest, "semihard" the farthest that is nearer than the
            negative.
        negative: "hard" is the nearest, "easy" the farthest, "semihard" the nearest that is farther than the
            positive; not both "semihard".
        distance: "euclidean", "sqeuclidean" or "cosine" (1 - cos; a zero vector is at distance 1 from all).

    Returns:
        (anchors, positives, negatives): int64 of one length, anchors ascending, only those that have both.
        Identical rows: the lowest index. Which of two almost equal distances is larger, rounding decides.
        With a NaN or inf in the embeddings nothing is chosen. Their length depends on the values, so
        torch.vmap cannot batch this call.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown strategy or distance, both strategies "semihard", or shapes or devices that do not
            go together.
    """
    _checks.mining_strategies("batch_hard_mine", positive=positive, negative=negative)
    arguments = _checks.batch_hard(
        "batch_hard_mine", embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    sets = [None if a is None else a.detach() for a in arguments]
    if positive == negative == "hard":
        positives, negatives = _ops.batch_hard_mine(*sets, distance)
    else:
        positives, negatives = _ops.mine_triplets(*sets, positive, negative, distance)
    anchors = torch.nonzero(positives >= 0).squeeze(1)
    return anchors, positives[anchors].long(), negatives[anchors].long()


def batch_hard_triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    positive: str = "hard",
    negative: str = "hard",
    margin: float = 0.2,
    soft: bool = False,
    distance: str = "euclidean",
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | TripletLossResult:
    """Triplet loss of every anchor with its hardest positive and hardest negative, without an N x N matrix.

    Or with easier ones. `relu(d_ap - d_an + margin)`, or `softplus(d_ap - d_an)` when `soft`. An anchor
    without such a positive or without such a negative is not valid and costs nothing. Source: Hermans, Beyer,
    Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017), eq. 5; the soft margin is of
    its section 2.

    Tiles of distances only choose the triplets, and where a choice has lost its digits to cancellation it is
    made again by differences; the chosen distances are then computed as direct differences, so loss and
    gradient are exact to rounding. Both, and the choice, come out in the same bits from every run, for any
    number of threads.

    Args:
        embeddings, labels, ref_embeddings, ref_labels, positive, negative, distance: as in `batch_hard_mine`.
            (Under torch.vmap leave the references out for the self form: it hides that two arguments are one
            tensor.)
        margin: finite, >= 0, in units of the distance; not used when `soft`.
        soft: the soft margin.
        reduction: "mean" over valid anchors, "mean_nonzero" over anchors whose loss is > 0, "sum", or "none"
            for [N] with 0 at anchors that are not valid. The mean of nothing is 0.
        return_stats: return a `TripletLossResult`, whose statistics are detached and stay on the device.

    Returns:
        Scalar, or [N] for "none"; float32, or float64 for float64 input. Half inputs are computed in float32,
        their gradients come in the input's dtype. Gradients flow into both embeddings, to any order; that of
        a Euclidean distance is 0 at 0, and that of a cosine distance is 0 at a zero vector. A NaN or inf in
        an embedding makes the loss NaN, and so do rows too long for their squares (1e18 in float32).

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: unknown strategy, distance or reduction, both strategies "semihard", negative or
            non-finite margin, or shapes or devices that do not go together.
    """
    function = "batch_hard_triplet_loss"
    margin = _checks.batch_hard_options(
        function,
        positive=positive,
        negative=negative,
        margin=margin,
        soft=soft,
        distance=distance,
        reduction=reduction,
        return_stats=return_stats,
    )
    arguments = _checks.batch_hard(
        function, embeddings, labels, ref_embeddings, ref_labels, distance=distance
    )
    options = margin, soft, distance, reduction
    if positive == negative == "hard":
        loss, d_ap, d_an, positives, _ = _triplet_loss(*arguments, *options)
    else:
        loss, d_ap, d_an, positives, _ = _mined_triplet_loss(*arguments, positive, negative, *options)
    if not return_stats:
        return loss
    valid = positives >= 0
    valid_anchors = valid.sum()
    count = valid_anchors.clamp(min=1).to(d_ap.dtype)
    gap = d_ap - d_an
    active = valid & ((torch.nn.functional.softplus(gap, threshold=40) if soft else gap + margin) > 0)
    active_triplets = active.sum()
    return TripletLossResult(
        loss=loss,
        valid_anchors=valid_anchors,
        triplets=valid_anchors,
        active_triplets=active_triplets,
        active_fraction=active_triplets / count,
        mean_d_ap=d_ap.sum() / count,
        mean_d_an=d_an.sum() / count,
    )


# ---- shapes ------------------------------------------------------------------------------------------------


@torch.library.register_fake("deepsim_ext::batch_hard_mine")
@torch.library.register_fake("deepsim_ext::mine_triplets")
def _mined(embeddings, *_):
    positives = embeddings.new_empty(embeddings.shape[0], dtype=torch.int32)
    return positives, torch.empty_like(positives)


@torch.library.register_fake("deepsim_ext::batch_hard_triplet_loss")
@torch.library.register_fake("deepsim_ext::mined_triplet_loss")
def _(embeddings, *options):
    per_anchor = embeddings.new_empty(embeddings.shape[0], dtype=_checks.compute_dtype(embeddings))
    loss = torch.empty_like(per_anchor) if options[-1] == "none" else per_anchor.new_empty(())
    return loss, per_anchor, torch.empty_like(per_anchor), *_mined(embeddings)


@torch.library.register_fake("deepsim_ext::batch_hard_triplet_loss_backward")
def _(grad, embeddings, ref_embeddings, *others):
    with_references = ref_embeddings is not None and others[-1]
    grad_ref_shape = ref_embeddings.shape if with_references else (0, embeddings.shape[1])
    return embeddings.new_empty(embeddings.shape), embeddings.new_empty(grad_ref_shape)


# ---- gradients ---------------------------------------------------------------------------------------------


def _save_for_loss_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, _, ref_embeddings, _, *options = inputs
    ctx.options, ctx.inputs = options[-4:], len(inputs)  # strategies, which come first, are for mining only
    # Under torch.func's transforms a tensor that is differentiated does not say so.
    transformed = torch._C._are_functorch_transforms_active()
    ctx.with_ref_gradient = ref_embeddings is not None and (transformed or ctx.needs_input_grad[2])
    _, d_ap, d_an, positives, negatives = output
    ctx.mark_non_differentiable(d_ap, d_an, positives, negatives)
    ctx.set_materialize_grads(False)  # of what is not differentiable
    ctx.save_for_backward(embeddings, ref_embeddings, positives, negatives, d_ap, d_an)


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * ctx.inputs
    saved = ctx.saved_tensors
    grad, grad_ref = _triplet_loss_gradient(grad_loss, *saved, *ctx.options, ctx.with_ref_gradient)
    return grad, None, grad_ref if ctx.with_ref_gradient else None, *(None,) * (ctx.inputs - 3)


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_loss, embeddings, ref_embeddings, positives, negatives, d_ap, _, *ctx.options, with_ref = inputs
    ctx.with_ref_gradient = ref_embeddings is not None and with_ref
    ctx.save_for_backward(grad_loss, embeddings, ref_embeddings, positives, negatives, d_ap)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Gradient of the gradient, by torch's own autograd of the loss of the chosen triplets."""
    grad_loss, embeddings, ref_embeddings, positives, negatives, d_ap = ctx.saved_tensors
    margin, soft, distance, reduction = ctx.options
    sets = (embeddings, ref_embeddings) if ctx.with_ref_gradient else (embeddings,)

    def loss(*sets: Tensor) -> Tensor:
        x, ref = sets if len(sets) == 2 else (*sets, ref_embeddings)
        return reference.indexed_triplet_loss(
            x, ref, positives, negatives, margin=margin, soft=soft, distance=distance, reduction=reduction
        )

    def gradient(grad_loss: Tensor, *sets: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(loss, *sets)[1](grad_loss)

    _, pull_back = torch.func.vjp(gradient, grad_loss, *sets)
    # Where the op found the rows too long to be compared, torch sees no triplets and would say 0.
    poison = torch.where(d_ap.isnan().any(), torch.nan, 0.0)
    grad_grad_loss, grad_x, *grad_ref = (g + poison.to(g.dtype) for g in pull_back(grads[: len(sets)]))
    return grad_grad_loss, grad_x, grad_ref[0] if grad_ref else None, *(None,) * 9


register_vmap_by_loop("batch_hard_mine")
register_vmap_by_loop("mine_triplets")
_triplet_loss_gradient = differentiable(
    "batch_hard_triplet_loss_backward", _double_backward, _save_for_double_backward
)
_triplet_loss = differentiable("batch_hard_triplet_loss", _loss_backward, _save_for_loss_backward)
_mined_triplet_loss = differentiable("mined_triplet_loss", _loss_backward, _save_for_loss_backward)
