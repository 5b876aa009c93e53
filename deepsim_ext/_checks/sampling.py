"""Samplers of batches: labels, sizes, ranks, and where to go on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .options import flag, integer_in, positive_integer
from .tensors import is_dense, tensor_error
from .texts import describe, error

LARGEST = 2**63 - 1


class SamplerArguments(NamedTuple):
    labels: np.ndarray  # int64 [N]
    classes_per_batch: int
    samples_per_class: int
    num_replicas: int
    rank: int
    seed: int


def class_balanced_batch_sampler(
    function: str,
    labels: Tensor,
    *,
    classes_per_batch: int,
    samples_per_class: int,
    num_replicas: int,
    rank: int,
    seed: int,
    split_classes: bool,
) -> SamplerArguments:
    """All arguments of ClassBalancedBatchSampler."""
    if not is_dense(labels, (torch.int64,)) or labels.ndim != 1 or not len(labels):
        raise tensor_error(function, "labels", "int64 of shape [N] with N >= 1", labels, (torch.int64,))
    classes_per_batch = positive_integer(function, "classes_per_batch", classes_per_batch)
    samples_per_class = positive_integer(function, "samples_per_class", samples_per_class)
    num_replicas = positive_integer(function, "num_replicas", num_replicas)
    rank = integer_in(function, "rank", rank, 0, num_replicas - 1)
    seed = integer_in(function, "seed", seed, 0, LARGEST)
    flag(function, "split_classes", split_classes)
    if split_classes and samples_per_class % num_replicas:
        expected = f"a multiple of num_replicas {num_replicas} to be split"
        raise error(ValueError, function, "samples_per_class", expected, describe(samples_per_class))
    labels = labels.cpu().numpy()
    classes = len(np.unique(labels))
    if classes < classes_per_batch * num_replicas:
        expected = (
            f"of at least classes_per_batch x num_replicas = {classes_per_batch * num_replicas} classes"
        )
        raise error(ValueError, function, "labels", expected, f"{classes}")
    return SamplerArguments(labels, classes_per_batch, samples_per_class, num_replicas, rank, seed)


def epoch(function: str, value: int) -> int:
    return integer_in(function, "epoch", value, 0, LARGEST)


def sampler_state(function: str, state: Any, batches: int) -> dict[str, int]:
    """What ClassBalancedBatchSampler.state_dict returned, of a sampler with as many batches an epoch."""
    if not isinstance(state, dict) or state.keys() != {"epoch", "batch"}:
        got = f"a dict of {sorted(map(str, state))}" if isinstance(state, dict) else describe(state)
        raise error(TypeError, function, "state", 'a dict of "epoch" and "batch"', got)
    return {
        "epoch": integer_in(function, 'state["epoch"]', state["epoch"], 0, LARGEST),
        "batch": integer_in(function, 'state["batch"]', state["batch"], 0, batches),
    }
