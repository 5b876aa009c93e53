"""Batches of P classes x K samples, on one rank or many."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from .._checks import sampling as checks


class ClassBalancedBatchSampler(Sampler[list[int]]):
    """Batches of `classes_per_batch` classes with `samples_per_class` samples each, for the loader of a rank.

        sampler = ClassBalancedBatchSampler(labels, 8, 4)
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for images, labels in loader: ...

    The P K batches of deep metric learning: every anchor meets K - 1 positives and many negatives. Source:
    Hermans, Beyer, Leibe, "In Defense of the Triplet Loss for Person Re-Identification" (2017), section 2.

    With W ranks the global batch has W P K samples of W P distinct classes. All ranks draw the same sequence
    of global batches from the same seed, without a word between them, and each takes its share: the samples
    of its own P classes, so that no class is on two ranks. Then losses and batch statistics of a single rank
    see whole classes, too. With `split_classes` each rank has K / W samples of all W P classes instead. The
    global batches, ranks in order, are the same for every W with the same W P (and, with `split_classes`, up
    to their order).

    In an epoch every sample comes at least once, and no class twice in a global batch. The samples of a class
    of n make ceil(n / K) groups of K; the last one is filled up with others of the class. An epoch has as
    many batches as hold all groups, and as the largest class has groups. Where that leaves room, classes
    repeat, those with the fewest groups first. A class of fewer than K samples has each of them in a group
    about equally often, so that its batches are as large as all others; leave such classes out of the data
    set if you do not want them.

    Args:
        labels: int64 [N], the class of every sample of the data set. The same on every rank.
        classes_per_batch: P, of the batch of one rank.
        samples_per_class: K.
        num_replicas: W; None: the size of the default process group, 1 if there is none.
        rank: None: the rank in the default process group, 0 if there is none.
        seed: an integer >= 0, the same on every rank.
        split_classes: give every rank a share of each class rather than classes of its own.

    Raises:
        TypeError: an argument of the wrong Python type or dtype.
        ValueError: labels that are not [N] or have fewer than W P classes, a rank that is not one of W, or
            samples that cannot be split evenly.
    """

    def __init__(
        self,
        labels: Tensor,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        split_classes: bool = False,
    ) -> None:
        in_group = dist.is_available() and dist.is_initialized()
        arguments = checks.class_balanced_batch_sampler(
            type(self).__name__,
            labels,
            classes_per_batch=classes_per_batch,
            samples_per_class=samples_per_class,
            num_replicas=(dist.get_world_size() if in_group else 1) if num_replicas is None else num_replicas,
            rank=(dist.get_rank() if in_group else 0) if rank is None else rank,
            seed=seed,
            split_classes=split_classes,
        )
        self.classes_per_batch, self.samples_per_class = (
            arguments.classes_per_batch,
            arguments.samples_per_class,
        )
        self.num_replicas, self.rank = arguments.num_replicas, arguments.rank
        self.seed, self.split_classes = arguments.seed, split_classes
        self.epoch = 0
        self._drawn = 0  # batches of the epoch that were handed out
        self._start = 0  # batch at which the next iteration starts
        classes, sizes = np.unique(arguments.labels, return_counts=True)
        by_class = np.argsort(arguments.labels, kind="stable")
        self._samples = np.split(by_class, sizes.cumsum()[:-1])
        groups = -(-sizes // self.samples_per_class)
        self._batches = int(max(groups.max(), -(-groups.sum() // self._global_classes)))
        self._groups = groups

    @property
    def _global_classes(self) -> int:
        return self.classes_per_batch * self.num_replicas

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self._batches

    def set_epoch(self, epoch: int) -> None:
        """Chooses the batches of the next iterations: the same for the same seed and epoch.

        Without a call every iteration has the batches of epoch 0.
        """
        epoch = checks.epoch(f"{type(self).__name__}.set_epoch", epoch)
        if epoch != self.epoch:
            self.epoch, self._drawn, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out.

        A DataLoader with workers draws some batches ahead of those that it returns. Count what you trained on
        and put that number into "batch" if you use one.
        """
        return {"epoch": self.epoch, "batch": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration leaves out the first `state["batch"]` batches of the epoch; later ones do not.

        Labels, P, K, W P, seed and split_classes are taken to be those of the sampler that the state is of.
        """
        state = checks.sampler_state(f"{type(self).__name__}.load_state_dict", state, len(self))
        self.epoch = state["epoch"]
        self._drawn = self._start = state["batch"]

    def __iter__(self) -> Iterator[list[int]]:
        # Not before the first batch is asked for: a DataLoader with workers makes an iterator that it drops.
        start, self._start = self._start, 0
        self._drawn = start
        for batch, rows in enumerate(self._global_batches()):
            if batch >= start:
                self._drawn = batch + 1
                yield self._share(rows)

    def _share(self, rows: np.ndarray) -> list[int]:
        """This rank's part of a global batch [W P, K]."""
        axis = 1 if self.split_classes else 0
        return np.split(rows, self.num_replicas, axis)[self.rank].ravel().tolist()

    def _global_batches(self) -> Iterator[np.ndarray]:
        """All batches of the epoch, int64 [W P, K] of samples."""
        generator = np.random.default_rng([self.seed, self.epoch])
        classes = [_Class(samples, generator) for samples in self._samples]
        left = self._quotas(generator)
        for batches in range(len(self), 0, -1):
            # A class with a group for every batch that is left is due. The others come at random, more often
            # the more groups they have: these are the keys of weighted sampling without replacement of
            # Efraimidis and Spirakis (2006). There are always enough: left.sum() == batches * W P.
            with np.errstate(divide="ignore"):
                keys = generator.exponential(size=len(left)) / left
            keys[left == batches] = -1
            chosen = generator.permutation(
                np.argpartition(keys, self._global_classes - 1)[: self._global_classes]
            )
            left[chosen] -= 1
            yield np.stack([classes[c].group(self.samples_per_class) for c in chosen])

    def _quotas(self, generator: np.random.Generator) -> np.ndarray:
        """How often each class comes in the epoch: all its groups, and what fills up the batches."""
        slots = len(self) * self._global_classes
        low, high = 0, len(self)  # of the most that every class can have at least
        while low < high:
            level = (low + high + 1) // 2
            if np.maximum(self._groups, level).sum() <= slots:
                low = level
            else:
                high = level - 1
        quotas = np.maximum(self._groups, low)
        (fewest,) = (quotas == low).nonzero()
        quotas[generator.permutation(fewest)[: slots - quotas.sum()]] += 1
        return quotas


class _Class:
    """The samples of a class in random order, time and again; no group has one twice if it can be helped."""

    def __init__(self, samples: np.ndarray, generator: np.random.Generator) -> None:
        self.samples, self.generator = samples, generator
        self.ahead = samples[:0]

    def group(self, size: int) -> np.ndarray:
        group = self.ahead[:size]
        self.ahead = self.ahead[size:]
        while len(group) < size:
            shuffled = self.generator.permutation(self.samples)
            times = (shuffled[:, None] == group).sum(axis=1)
            shuffled = shuffled[np.argsort(times, kind="stable")]  # first those that the group has least
            missing = size - len(group)
            group, self.ahead = np.concatenate([group, shuffled[:missing]]), shuffled[missing:]
        return group
