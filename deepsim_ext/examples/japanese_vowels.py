"""Who speaks? Nine men say /ae/; learn from six of them, tell the other three apart by a single utterance.

    pip install --no-deps aeon
    python -m deepsim_ext.examples.japanese_vowels

An utterance is a series of 7 to 29 frames of 12 cepstral coefficients: 640 in all, which come in the wheel of
aeon as text; aeon itself is not imported, so its dependencies are not needed. A small network of 1-D
convolutions takes the mean over time and learns by batch-hard triplets. Two questions:

- speakers that were never heard: each seed leaves out its own three. One-shot identification (chance is 33 %)
  and verification of random pairs;
- the split of the data set: all nine speakers, 270 utterances to learn from, the nearest of them to each of
  the other 370.

Of the speakers that were never heard the network knows more than the plain means over time do, but no more
than these when they are whitened: six speakers are few. On the split it is ahead of both. Needs the extra
`deepsim-ext[eval]` besides.

Source of the data: Kudo, Toyama, Shimbo, "Multidimensional Curve Classification Using Passing-Through
Regions" (1999); UCI Machine Learning Repository, Japanese Vowels.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._threads import one_thread
from ..functional import batch_hard_triplet_loss, nearest_neighbors
from . import _runs

SPEAKERS, LEFT_OUT = 9, 3
COEFFICIENTS, LONGEST = 12, 29  # frames
EMBEDDING_SIZE = 32
VOICES_PER_BATCH, UTTERANCES_PER_VOICE = 24, 4
STEPS = 150


class Utterances(NamedTuple):
    frames: Tensor  # float32 [N, COEFFICIENTS, LONGEST], 0 after the end
    lengths: Tensor  # int64 [N]
    speakers: Tensor  # int64 [N]

    def of(self, rows: Tensor) -> Utterances:
        """Those of some rows, by index or mask."""
        return Utterances(*(tensor[rows] for tensor in self))


Embed = Callable[[Utterances], Tensor]


class Result(NamedTuple):
    one_shot: float  # of three speakers that were never heard
    auc: float  # of verifying them
    nine_speakers: float  # accuracy of the nearest utterance, on the split of the data set


def find(split: str) -> Path:
    """The file of "TRAIN" or "TEST".

    Raises:
        ImportError: aeon is not installed.
    """
    spec = importlib.util.find_spec("aeon")
    if spec is None:
        raise ImportError("the utterances come with aeon, which is not installed; pip install --no-deps aeon")
    folder = Path(spec.submodule_search_locations[0], "datasets", "data", "JapaneseVowels")
    return folder / f"JapaneseVowels_{split}.ts"


def read(path: Path) -> Utterances:
    """A file with an utterance a line: the coefficients one after the other, then the speaker, 1 to 9.

    Raises:
        ValueError: a line is something else.
    """
    frames, lengths, speakers = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line or line[0] in "#@":
            continue
        *series, speaker = line.split(":")
        try:
            utterance = torch.tensor([[float(value) for value in one.split(",")] for one in series])
            if len(utterance) != COEFFICIENTS or not 1 <= utterance.shape[1] <= LONGEST:
                raise ValueError(f"got shape {list(utterance.shape)}")
            speakers.append(int(speaker) - 1)
        except ValueError as problem:
            expected = f"{COEFFICIENTS} series of at most {LONGEST} numbers and a speaker"
            raise ValueError(f"{path}, line {number}: not {expected}: {problem}") from problem
        lengths.append(utterance.shape[1])
        frames.append(F.pad(utterance, (0, LONGEST - lengths[-1])))
    return Utterances(torch.stack(frames), torch.tensor(lengths), torch.tensor(speakers))


def inside(lengths: Tensor) -> Tensor:
    """Which frames are there: float32 [N, 1, LONGEST] of 1 and 0."""
    return (torch.arange(LONGEST) < lengths[:, None])[:, None].float()


def means(utterances: Utterances) -> Tensor:
    """The mean over time, [N, COEFFICIENTS]."""
    return utterances.frames.sum(2) / utterances.lengths[:, None]


class Network(nn.Module):
    """Series with lengths to embeddings on the unit sphere.

    Two convolutions, and beside them the frames as they are; then the mean over the frames that are there.

    Args:
        known: whose mean and spread of every coefficient is taken as 0 and 1.
    """

    def __init__(self, known: Utterances, width: int = 64) -> None:
        super().__init__()
        frames = known.frames.transpose(1, 2)[inside(known.lengths)[:, 0] > 0]
        self.register_buffer("mean", frames.mean(0)[:, None])
        self.register_buffer("spread", frames.std(0)[:, None])
        self.first = nn.Conv1d(COEFFICIENTS, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, padding=1)
        self.last = nn.Linear(width + COEFFICIENTS, EMBEDDING_SIZE, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING_SIZE, affine=False)

    def standardized(self, frames: Tensor, lengths: Tensor) -> Tensor:
        return (frames - self.mean) / self.spread * inside(lengths)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Standardized frames [N, COEFFICIENTS, LONGEST] to [N, EMBEDDING_SIZE]."""
        there = inside(lengths)
        learnt = F.gelu(self.first(x)) * there
        learnt = F.gelu(self.second(learnt)) * there
        pooled = torch.cat([learnt, x], dim=1).sum(2) / lengths[:, None]
        return F.normalize(self.norm(self.last(pooled)))

    @torch.no_grad()
    def embed(self, utterances: Utterances) -> Tensor:
        """[N, EMBEDDING_SIZE]."""
        self.eval()
        return self(self.standardized(utterances.frames, utterances.lengths), utterances.lengths)


def train(network: Network, utterances: Utterances, seed: int, *, made_up: bool, steps: int = STEPS) -> None:
    """Batch-hard triplets of voices.

    Args:
        made_up: a voice is a speaker moved by a random offset of the coefficients, and another voice than the
            speaker's own. Six speakers are learnt by heart without a lesson for the seventh; but an offset
            is what another vocal tract or microphone adds to every frame of the cepstrum, so that there is
            no end of voices, and what differs between utterances of one is what to overlook. False: speakers
            as they are, where there are no others to come.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [(utterances.speakers == s).nonzero()[:, 0] for s in utterances.speakers.unique()]
    x = network.standardized(utterances.frames, utterances.lengths)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        speakers = torch.randint(len(rows), (VOICES_PER_BATCH,), generator=generator)
        pools = [rows[speaker] for speaker in speakers.tolist()]
        drawn = [torch.randperm(len(pool), generator=generator)[:UTTERANCES_PER_VOICE] for pool in pools]
        batch = torch.cat([pool[i] for pool, i in zip(pools, drawn, strict=True)])
        voices = torch.arange(VOICES_PER_BATCH) if made_up else speakers
        offsets = made_up * torch.randn(VOICES_PER_BATCH, COEFFICIENTS, 1, generator=generator)
        noise = 0.3 * torch.randn(len(batch), COEFFICIENTS, LONGEST, generator=generator)
        lengths = utterances.lengths[batch]
        heard = x[batch] + offsets.repeat_interleave(UTTERANCES_PER_VOICE, 0) + noise
        loss = batch_hard_triplet_loss(
            network(heard * inside(lengths), lengths),
            voices.repeat_interleave(UTTERANCES_PER_VOICE),
            margin=0.3,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def whitened_means(known: Utterances) -> Embed:
    """The mean over time in units of what varies within a speaker, measured on known ones.

    Source: Hatch, Kajarekar, Stolcke, "Within-Class Covariance Normalization for SVM-based Speaker
    Recognition" (2006).
    """
    points, within = means(known), torch.empty(len(known.speakers), COEFFICIENTS)
    for speaker in known.speakers.unique():
        mine = known.speakers == speaker
        within[mine] = points[mine] - points[mine].mean(0)
    units = torch.linalg.cholesky(torch.linalg.inv(within.T.cov()))
    return lambda utterances: means(utterances) @ units


def score(unknown: Utterances, split: Sequence[Utterances], open_set: Embed, closed_set: Embed) -> Result:
    """Of what embeds speakers that were never heard, and of what embeds both parts of the split."""
    known, asked = split
    nearest = nearest_neighbors(closed_set(asked), closed_set(known), 1).indices[:, 0]
    right = known.speakers[nearest] == asked.speakers
    return Result(*_runs.score(open_set(unknown), unknown.speakers), right.double().mean().item())


def run(seed: int, steps: int = STEPS) -> dict[str, Result]:
    """The scores of two networks, one that learnt six speakers and one for the split, and of their rivals.

    Raises:
        ImportError: aeon is not installed.
    """
    split = [read(find(name)) for name in ("TRAIN", "TEST")]
    everything = Utterances(*(torch.cat(tensors) for tensors in zip(*split, strict=True)))
    order = torch.randperm(SPEAKERS, generator=torch.Generator().manual_seed(seed))
    left_out = torch.isin(everything.speakers, order[:LEFT_OUT])
    known, unknown = everything.of(~left_out), everything.of(left_out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = Network(known), Network(split[0])

    with one_thread():
        embeds = [network.embed for network in networks]
        scores = {
            "means over time": score(unknown, split, means, means),
            "the same, whitened": score(unknown, split, whitened_means(known), whitened_means(split[0])),
            "untrained network": score(unknown, split, *embeds),
        }
        train(networks[0], known, seed, made_up=True, steps=steps)
        train(networks[1], split[0], seed, made_up=False, steps=steps)
        return scores | {"trained network": score(unknown, split, *embeds)}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the scores over some seeds; exit code 0, or 1 for a missing package."""
    return _runs.main("japanese_vowels", "Speakers that were never heard, by a single utterance.", run, argv)


if __name__ == "__main__":
    sys.exit(main())
