"""Lets every test of CPU tensors run on the GPU."""

from __future__ import annotations

from typing import Any

import torch

OPS = (
    "batch_all_triplet_loss",
    "batch_contrastive_loss",
    "batch_hard_mine",
    "batch_hard_triplet_loss",
    "batch_hard_triplet_loss_backward",
    "batch_semi_hard_triplet_loss",
    "contrastive_loss",
    "contrastive_loss_backward",
    "gram_matrix",
    "gram_matrix_backward",
    "mine_triplets",
    "mined_triplet_loss",
    "nearest_neighbors",
    "pair_distances",
    "pair_distances_backward",
    "style_loss",
    "style_loss_backward",
    "triplet_margin_loss",
    "triplet_margin_loss_backward",
)

_library = None  # what is registered lasts as long as this


def redirect(device: str = "cuda") -> None:
    """Replaces the ops' CPU kernels: arguments go to `device`, its kernel runs, results come back.

    Everything above the kernels, autograd, torch.compile and opcheck included, goes on seeing CPU tensors.
    """
    global _library
    import deepsim_ext  # noqa: F401  (registers the ops)

    _library = torch.library.Library("deepsim_ext", "IMPL")
    for op in OPS:
        overload = getattr(torch.ops.deepsim_ext, op).default

        def there_and_back(*arguments: Any, overload: Any = overload) -> Any:
            return _to(overload(*(_to(a, device) for a in arguments)), "cpu")

        _library.impl(op, there_and_back, "CPU")


def _to(value: Any, device: str) -> Any:
    """A tensor, or those of a list or tuple, on `device`, with its strides; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_to(v, device) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type == device:
        return value
    # Tensor.to makes a dense copy of a strided view. The kernels are to see the view.
    storage_size = value.untyped_storage().nbytes() // value.element_size()
    whole = value.as_strided((storage_size,), (1,), 0).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())
