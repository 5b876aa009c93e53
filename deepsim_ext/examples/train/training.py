"""Steps, evaluations and checkpoints of a run."""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from ...distributed import DistributedLoss
from ...distributed.sampler import ClassBalancedBatchSampler
from ...evaluation import retrieval_metrics
from ...nn import BatchAllTripletLoss, BatchContrastiveLoss, BatchHardTripletLoss, BatchSemiHardTripletLoss
from . import checkpoints, network
from .data import Data, augmented
from .log import Log

# by name: the loss, and its option that is meant by --margin
LOSSES = {
    "batch_hard": (BatchHardTripletLoss, "margin"),
    "semi_hard": (BatchSemiHardTripletLoss, "margin"),
    "batch_all": (BatchAllTripletLoss, "margin"),
    "contrastive": (BatchContrastiveLoss, "neg_margin"),
}
AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES = ("cosine", "constant")
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that stop a run


class Processes(NamedTuple):
    """Of the run, and which one this is."""

    rank: int
    count: int
    device: torch.device


class Training:
    """All that a step changes; a torch.distributed.checkpoint `Stateful`."""

    def __init__(self, settings: argparse.Namespace, data: Data, processes: Processes) -> None:
        self.settings, self.processes = settings, processes
        self.device = processes.device
        self.step = 0
        self.plain_network = network.build(data.shape, settings.embedding_size, settings.seed).to(self.device)
        self.network = DistributedDataParallel(self.plain_network)
        self._settle(data.shape)
        self.optimizer = torch.optim.AdamW(
            self.plain_network.parameters(), settings.lr, weight_decay=settings.weight_decay
        )
        loss, margin = LOSSES[settings.loss]
        options = {} if settings.margin is None else {margin: settings.margin}
        self.loss = DistributedLoss(loss(**options, return_stats=True))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "float16")

    def _settle(self, shape: tuple[int, int, int]) -> None:
        """A pass without effect, after which DDP puts gradients into buckets in the order they arrive in.

        With more than two processes the order of sums depends on the buckets: a run that goes on would have
        those of a first step where the one that was never interrupted has these.
        """
        self.network(torch.zeros(1, *shape, device=self.device)).sum().backward()
        self.network.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        weights, optimizer = get_state_dict(self.plain_network, self.optimizer)
        state = {"network": weights, "optimizer": optimizer, "step": torch.tensor(self.step)}
        return state | ({"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.plain_network,
            self.optimizer,
            model_state_dict=state["network"],
            optim_state_dict=state["optimizer"],
        )
        self.step = int(state["step"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def update(self, images: Tensor, labels: Tensor, steps: int) -> tuple[NamedTuple, float]:
        """A step of `steps`; the loss of the global batch with its statistics, and the learning rate."""
        rank, count, _ = self.processes
        if self.settings.augment:
            noise = np.random.default_rng([self.settings.seed, self.step]).random((count, len(images), 4))
            images = augmented(images, torch.from_numpy(noise[rank]).float())
        # For whatever a network draws, such as dropout.
        (seed,) = np.random.SeedSequence([self.settings.seed, self.step, rank]).generate_state(1)
        torch.manual_seed(int(seed))
        lr = self.settings.lr
        if self.settings.schedule == "cosine":
            lr *= (1 + math.cos(math.pi * self.step / steps)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self._autocast():
            embeddings = self.network(images)
        result = self.loss(embeddings, labels)
        self.optimizer.zero_grad()
        self.scaler.scale(result.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return result, lr

    @torch.no_grad()
    def embed(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Embeddings [W N, D] of the N images that each of W processes has."""
        self.plain_network.eval()
        with self._autocast():
            mine = torch.cat([self.plain_network(images.to(self.device)) for images, _ in batches])
        self.plain_network.train()
        parts = [torch.empty_like(mine) for _ in range(self.processes.count)]
        dist.all_gather(parts, mine)
        return torch.cat(parts)

    def _autocast(self) -> torch.autocast | nullcontext:
        amp = self.settings.amp
        return nullcontext() if amp is None else torch.autocast(self.device.type, AMP[amp])


def run(
    settings: argparse.Namespace,
    data: Data,
    parts: tuple[Tensor, Tensor],
    processes: Processes,
    stopped: Callable[[], int],
) -> int:
    """Trains, from the last checkpoint if there is one, and leaves checkpoints, log and network.

    Args:
        settings: the command's.
        data: all of it.
        parts: rows of `data` to train on, and those held out.
        stopped: the signal that asks this process to stop, or 0.

    Returns:
        The signal that stopped it, or 0.
    """
    from tqdm import tqdm

    rank, count, device = processes
    trained, held_out = parts
    sampler = ClassBalancedBatchSampler(
        data.labels[trained], settings.classes // count, settings.samples, seed=settings.seed
    )
    workers = {"num_workers": settings.workers, "pin_memory": device.type == "cuda"}
    loader = DataLoader(Subset(data.images, trained.tolist()), batch_sampler=sampler, **workers)
    batch_size = sampler.classes_per_batch * settings.samples
    share = Subset(data.images, _share(held_out, rank, count).tolist())
    held_out_loader = DataLoader(share, batch_size, **workers)
    held_out_labels = data.labels[held_out].to(device)

    training = Training(settings, data, processes)
    folder = settings.out / "checkpoints"
    saved = _last_checkpoint(folder, processes)
    if saved:
        checkpoints.load(folder, saved, training)
    epoch, batch = divmod(training.step, len(sampler))
    sampler.load_state_dict({"epoch": epoch, "batch": batch})
    steps = settings.epochs * len(sampler)

    def evaluate() -> None:
        if len(held_out):
            embeddings = training.embed(_batches(held_out_loader))
            if rank == 0:
                metrics = _metrics(embeddings[: len(held_out)], held_out_labels)
                log.write("evaluation", training.step, metrics)
                progress.set_postfix(recall_at_1=f"{metrics['recall_at_1']:.3f}")

    with (
        closing(Log(settings.out, saved, settings.tensorboard)) if rank == 0 else nullcontext() as log,
        tqdm(desc="train", unit="step", total=steps, initial=training.step, disable=rank > 0) as progress,
    ):
        if training.step == 0:
            evaluate()
        while training.step < steps:
            epoch = training.step // len(sampler)
            sampler.set_epoch(epoch)
            since, logged = time.perf_counter(), training.step
            for images, labels in _batches(loader):
                result, lr = training.update(images.to(device), labels.to(device), steps)
                step = training.step
                progress.update()
                if rank == 0 and (step % settings.log_every == 0 or step == steps):
                    values = {name: value.item() for name, value in result._asdict().items()}
                    now = time.perf_counter()
                    speed = (step - logged) * batch_size * count / (now - since)
                    values |= {"epoch": epoch, "lr": lr, "samples_per_second": speed}
                    log.write("step", step, values)
                    since, logged = now, step
                if step % len(sampler) == 0:
                    evaluate()
                number = _of_any(stopped())
                if step % settings.checkpoint_every == 0 or step == steps or number:
                    if rank == 0:
                        log.sync()
                    checkpoints.save(folder, step, training, rank)
                if step < steps and number:
                    return number
    if rank == 0:
        network.save(training.plain_network, settings.out / "network.pt")
    return 0


def _batches(loader: DataLoader) -> Iterator[list[Tensor]]:
    """Of workers that begin with signals blocked: they are at work until the run has stopped."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _of_any(number: int) -> int:
    """The greatest of all processes, so that all stop after the same step."""
    greatest = torch.tensor(number)
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return int(greatest)


def _last_checkpoint(folder: Path, processes: Processes) -> int:
    """The step of the last one, as the first process sees it; 0 if there is none."""
    step = torch.zeros((), dtype=torch.int64, device=processes.device)
    if processes.rank == 0:
        checkpoints.clean(folder)
        step.fill_(max(checkpoints.steps(folder), default=0))
    dist.broadcast(step, 0)
    return int(step)


def _share(rows: Tensor, rank: int, count: int) -> Tensor:
    """A process's part of the rows, as large as all others: some rows come again at the end."""
    size = math.ceil(len(rows) / count)
    return rows[torch.arange(rank * size, (rank + 1) * size) % max(1, len(rows))]


def _metrics(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """How well each embedding finds its own class among the others."""
    metrics = retrieval_metrics(embeddings, labels)._asdict()
    recalls = {f"recall_at_{k}": recall for k, recall in metrics.pop("recall_at_k").items()}
    return recalls | metrics
