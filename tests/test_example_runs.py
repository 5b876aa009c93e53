"""The scores and the command that the examples of recognition share."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("sklearn", reason="needs the extra eval")
from sklearn.metrics import roc_auc_score

from deepsim_ext.examples import _runs, digits_one_shot, japanese_vowels, text_matching
from deepsim_ext.examples._runs import Scores, one_shot_accuracy, score, verification_auc

EXAMPLES = {
    "digits_one_shot": digits_one_shot,
    "japanese_vowels": japanese_vowels,
    "text_matching": text_matching,
}


def test_identities_far_apart_are_always_told_apart():
    labels = torch.arange(40) % 4
    assert score(10.0 * labels[:, None] + torch.rand(40, 3), labels) == Scores(1.0, 1.0)


def test_embeddings_that_say_nothing_are_at_chance():
    labels = torch.arange(500) % 5
    scores = score(torch.randn(500, 8), labels)
    assert abs(scores.one_shot - 1 / 5) < 0.02
    assert abs(scores.auc - 1 / 2) < 0.02


def test_one_shot_counts_identities_alike():
    labels = torch.tensor([0] * 100 + [1] * 2)
    embeddings = torch.cat([torch.zeros(100), torch.tensor([5.0, 5.0])])[:, None]
    assert one_shot_accuracy(embeddings, labels) == 1.0
    # The second identity lies on top of the first: it is never found, for ties go to the first.
    assert one_shot_accuracy(torch.zeros(102, 1), labels) == 0.5


def test_nobody_in_the_gallery_asks():
    """Each embedding's neighbour is the other identity's: a gallery leads all or half of them astray."""
    accuracy = one_shot_accuracy(torch.tensor([[0.0], [10.0], [9.0], [1.0]]), torch.tensor([0, 0, 1, 1]), 400)
    assert abs(accuracy - 0.25) < 0.05


def test_verification_is_that_of_all_pairs():
    labels = torch.arange(60) % 3
    embeddings = torch.randn(60, 4) + labels[:, None]
    i, j = torch.triu_indices(60, 60, offset=1)
    exact = roc_auc_score(labels[i] == labels[j], -(embeddings[i] - embeddings[j]).norm(dim=1))
    assert abs(verification_auc(embeddings, labels) - exact) < 0.015


def test_the_command_prints_means_and_spreads(capsys):
    def run(seed: int) -> dict[str, Scores]:
        return {"a network": Scores(0.5 + 0.1 * seed, 0.25)}

    assert _runs.main("name", "A line.", run, ["--seeds", "3"]) == 0
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["one", "shot", "auc"]
    assert line.split() == ["a", "network", "0.600", "±", "0.100", "0.250", "±", "0.000"]
    assert _runs.main("name", "A line.", run, ["--seeds", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "network", "0.500", "0.250"]


def test_ctrl_c_is_a_line(capsys, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits_one_shot, "load_images", interrupted)
    assert digits_one_shot.main(["--seeds", "1"]) == 130
    assert capsys.readouterr() == ("", "\ninterrupted\n")


def test_no_seeds(capsys):
    with pytest.raises(SystemExit):
        digits_one_shot.main(["--seeds", "0"])
    assert "--seeds must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_scikit_learn(name, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "sklearn" else find_spec(n))
    assert EXAMPLES[name].main(["--seeds", "1"]) == 1
    assert capsys.readouterr().err == f'{name}: scikit-learn not installed; pip install "deepsim-ext[eval]"\n'


@pytest.mark.parametrize(
    ("name", "package", "said"),
    [
        (
            "japanese_vowels",
            "aeon",
            "the utterances come with aeon, which is not installed; pip install --no-deps aeon",
        ),
        ("text_matching", "scipy", 'scipy not installed; pip install "deepsim-ext[eval]"'),
    ],
)
def test_without_what_the_data_comes_with(name, package, said, capsys, monkeypatch):
    text_matching._all_documents.cache_clear()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find_spec(n))
    assert EXAMPLES[name].main(["--seeds", "1"]) == 1
    assert capsys.readouterr().err == f"{name}: {said}\n"
