"""Speakers by their vowels: the file, the mask over time, and what is learnt about speakers never heard."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from statistics import mean

import pytest
import torch
import torch.nn.functional as F

from deepsim_ext.examples.japanese_vowels import (
    COEFFICIENTS,
    LONGEST,
    Network,
    Utterances,
    find,
    means,
    read,
    run,
    whitened_means,
)

needs_aeon = pytest.mark.skipif(
    any(importlib.util.find_spec(module) is None for module in ("aeon", "sklearn")),
    reason="needs aeon and the extra eval",
)


def utterances(count: int = 40) -> Utterances:
    lengths = torch.randint(7, LONGEST + 1, (count,))
    frames = torch.randn(count, COEFFICIENTS, LONGEST) * (torch.arange(LONGEST) < lengths[:, None])[:, None]
    return Utterances(frames, lengths, torch.arange(count) % 4)


@needs_aeon
@pytest.mark.slow
def test_speakers_are_recognised_better_than_by_means_or_untrained():
    runs = [run(seed) for seed in range(3)]

    def gains(scored: str, field: str) -> list[float]:
        return [getattr(r[scored], field) - getattr(r["means over time"], field) for r in runs]

    # Over ten seeds training gains 0.048 ± 0.016 (0.028 to 0.082) of one-shot accuracy on unheard speakers
    # over the means (0.875), as much as whitening them does, and 0.030 ± 0.015 (0.013 to 0.059) of AUC.
    assert mean(gains("trained network", "one_shot")) >= 0.025
    assert mean(gains("trained network", "auc")) >= 0.01
    assert mean(gains("untrained network", "one_shot")) < 0.0
    assert mean(gains("untrained network", "auc")) < 0.0
    # Nine speakers: 0.984 to 0.989, the means 0.938, whitened 0.957, untrained 0.868 to 0.927.
    assert all(r["trained network"].nine_speakers >= 0.97 for r in runs)
    assert all(r["untrained network"].nine_speakers < 0.95 for r in runs)


@needs_aeon
def test_the_same_seed_learns_the_same():
    first, again = run(1, steps=2), run(1, steps=2)
    assert first == again
    assert first["trained network"] != first["untrained network"]


@needs_aeon
def test_the_data_set_is_complete():
    train, test = read(find("TRAIN")), read(find("TEST"))
    assert train.speakers.bincount().tolist() == [30] * 9
    assert test.speakers.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert (min(train.lengths.min(), test.lengths.min()), max(train.lengths.max(), test.lengths.max())) == (
        7,
        29,
    )
    assert train.frames[0, 0, 0] == 1.860936  # of the file's first line


def line(*, series: int = COEFFICIENTS, frames: int = 2, speaker: str = "3") -> str:
    return ":".join([",".join(f"{i}.{t}" for t in range(frames)) for i in range(series)] + [speaker])


def test_a_file_is_read(tmp_path: Path):
    path = tmp_path / "some.ts"
    path.write_text(f"#a comment\n@data\n{line()}\n\n{line(frames=3, speaker='1')}\n")
    frames, lengths, speakers = read(path)
    assert lengths.tolist() == [2, 3] and speakers.tolist() == [2, 0]
    assert frames.shape == (2, COEFFICIENTS, LONGEST)
    torch.testing.assert_close(frames[0, 5, :3], torch.tensor([5.0, 5.1, 0.0]))
    assert not frames[0, :, 2:].any() and not frames[1, :, 3:].any()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (line(series=11), "got shape [11, 2]"),
        (line(frames=30), "got shape [12, 30]"),
        (line(speaker="Kudo"), "Kudo"),
        (line().replace("5.1", "?"), "?"),
        ("1.0:" + line(series=11), "expected sequence of length"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, wrong: str, said: str):
    path = tmp_path / "some.ts"
    path.write_text(f"@data\n{line()}\n{wrong}\n")
    with pytest.raises(
        ValueError, match="line 3: not 12 series of at most 29 numbers and a speaker"
    ) as caught:
        read(path)
    assert said in str(caught.value)


def test_what_comes_after_the_end_does_not_count():
    heard = utterances()
    noisy = torch.where(heard.frames == 0, torch.randn(heard.frames.shape), heard.frames)
    network = Network(heard)
    torch.testing.assert_close(network.embed(heard._replace(frames=noisy)), network.embed(heard))


def test_padding_is_as_if_it_were_not_there():
    heard = utterances(8)
    network = Network(heard)
    network.norm.running_mean.normal_()
    embedded = network.embed(heard)  # which leaves it in evaluation mode
    for frames, length, expected in zip(heard.frames, heard.lengths, embedded, strict=True):
        x = ((frames[:, :length] - network.mean) / network.spread)[None]
        learnt = F.gelu(network.second(F.gelu(network.first(x))))
        pooled = torch.cat([learnt, x], dim=1).mean(2)
        torch.testing.assert_close(F.normalize(network.norm(network.last(pooled)))[0], expected)


def test_utterances_are_embedded_one_by_one():
    heard = utterances()
    network = Network(heard)
    rows = torch.tensor([7, 2])
    torch.testing.assert_close(network.embed(heard.of(rows)), network.embed(heard)[rows])
    torch.testing.assert_close(network.embed(heard).norm(dim=1), torch.ones(len(heard.lengths)))


def test_whitened_means_vary_by_one_within_a_speaker():
    heard = utterances(400)
    points = whitened_means(heard)(heard)
    centres = torch.stack([points[heard.speakers == s].mean(0) for s in range(4)])
    torch.testing.assert_close(
        (points - centres[heard.speakers]).T.cov(), torch.eye(COEFFICIENTS), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(means(heard)[0], heard.frames[0, :, : heard.lengths[0]].mean(1))
