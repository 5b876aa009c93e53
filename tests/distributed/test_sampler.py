"""P x K batches over ranks: coverage, disjoint shares, the same for any number of ranks, resuming."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from deepsim_ext.distributed.sampler import ClassBalancedBatchSampler

Batches = list[list[int]]


@st.composite
def settings(draw) -> tuple[Tensor, int, int, int, int]:
    """Labels, P, K, W and a seed: classes of any names and of 1 to 13 samples, a few of them large."""
    p, k, w = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 13) | st.integers(30, 40), min_size=p * w, max_size=12))
    names = draw(st.permutations([-7, -1, *range(20)]))[: len(sizes)]
    labels = torch.tensor(names).repeat_interleave(torch.tensor(sizes))
    seed = draw(st.integers(0, 2**40))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return labels[order], p, k, w, seed


def shares(labels: Tensor, p: int, k: int, w: int, seed: int = 0, epoch: int = 0, **options) -> list[Batches]:
    """The batches of an epoch on every rank."""
    result = []
    for rank in range(w):
        sampler = ClassBalancedBatchSampler(labels, p, k, num_replicas=w, rank=rank, seed=seed, **options)
        sampler.set_epoch(epoch)
        result.append(list(sampler))
        assert len(result[-1]) == len(sampler)
    return result


def global_batches(ranks: list[Batches]) -> Batches:
    return [sum(batch, []) for batch in zip(*ranks, strict=True)]


@given(settings())
def test_batches_are_of_p_classes_with_k_samples_and_no_class_is_on_two_ranks(setting):
    labels, p, k, w, seed = setting
    sizes = Counter(labels.tolist())
    ranks = shares(*setting)
    for batch in sum(ranks, []):
        assert [*Counter(labels[batch].tolist()).values()] == [k] * p
    for batch in global_batches(ranks):
        assert len(set(labels[batch].tolist())) == w * p
        times = Counter(batch)  # a class of n has each sample k // n times, or once more
        assert all(
            times[i] - k // sizes[c] in (0, 1) for i, c in zip(batch, labels[batch].tolist(), strict=True)
        )


@given(settings())
def test_an_epoch_has_every_sample_and_is_as_short_as_that_allows(setting):
    labels, p, k, w, _ = setting
    batches = global_batches(shares(*setting))
    assert {*sum(batches, [])} == {*range(len(labels))}
    groups = [-(-n // k) for n in Counter(labels.tolist()).values()]
    assert len(batches) == max(max(groups), -(-sum(groups) // (w * p)))


@given(settings())
def test_room_goes_to_the_classes_with_the_fewest_groups(setting):
    labels, _, k, _, _ = setting
    needed = {c: -(-n // k) for c, n in Counter(labels.tolist()).items()}
    times = Counter(c for batch in global_batches(shares(*setting)) for c in {*labels[batch].tolist()})
    repeated = [times[c] for c in needed if times[c] > needed[c]]
    if repeated:
        assert max(repeated) - min(times.values()) <= 1


@given(settings(), st.integers(0, 5))
def test_seed_and_epoch_decide(setting, epoch):
    labels, p, k, w, seed = setting
    once = shares(*setting, epoch)
    assert once == shares(*setting, epoch)
    if len(labels) >= 30:  # by chance the same once in a very long while
        assert once != shares(*setting, epoch + 1)
        assert once != shares(labels, p, k, w, seed + 1, epoch)
        # and not, as for a sum of both, those of the next seed's last epoch
        assert shares(labels, p, k, w, seed, epoch + 1) != shares(labels, p, k, w, seed + 1, epoch)


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_same_global_batches_for_any_number_of_ranks(epoch):
    labels = torch.arange(20).repeat_interleave(torch.arange(1, 21))
    one = global_batches(shares(labels, 12, 4, 1, epoch=epoch))
    for w in (2, 3, 4, 6, 12):
        assert global_batches(shares(labels, 12 // w, 4, w, epoch=epoch)) == one


def test_split_classes_have_a_share_on_every_rank():
    labels = torch.arange(9).repeat_interleave(7)
    whole = global_batches(shares(labels, 4, 6, 2))
    ranks = shares(labels, 4, 6, 2, split_classes=True)
    for batch in sum(ranks, []):
        assert [*Counter(labels[batch].tolist()).values()] == [3] * 8
    assert [sorted(batch) for batch in global_batches(ranks)] == [sorted(batch) for batch in whole]


def test_all_pairs_of_classes_meet():
    """Classes are drawn anew for every batch, not in fixed parties."""
    labels = torch.arange(10).repeat_interleave(80)
    pairs = Counter()
    for batch in shares(labels, 5, 4, 1)[0]:
        classes = sorted({*labels[batch].tolist()})
        pairs.update((a, b) for a in classes for b in classes if a < b)
    assert len(pairs) == 45  # each is expected 40 * 5 * 4 / (10 * 9) = 8.9 times
    assert max(pairs.values()) < 25


def test_a_small_class_is_spread_over_the_epoch():
    """Though the large ones are due in most batches."""
    labels = torch.arange(6).repeat_interleave(torch.tensor([8, 200, 200, 200, 200, 200]))
    where = []
    for epoch in range(20):
        batches = shares(labels, 2, 4, 1, epoch=epoch)[0]
        where += [i / len(batches) for i, batch in enumerate(batches) if 0 in labels[batch]]
    assert len(where) == 2 * 20  # uniform: mean 0.5, standard error 0.046
    assert 0.3 < sum(where) / len(where) < 0.7
    assert min(where) < 0.2 and max(where) > 0.8


@given(settings(), st.integers(0, 100), st.booleans())
def test_going_on_in_the_middle_of_an_epoch(setting, stop, again):
    labels, p, k, w, seed = setting

    def made() -> ClassBalancedBatchSampler:
        return ClassBalancedBatchSampler(labels, p, k, num_replicas=w, rank=w - 1, seed=seed)

    sampler = made()
    sampler.set_epoch(2)
    stop = min(stop, len(sampler))
    batches = iter(sampler)
    first = [next(batches) for _ in range(stop)]
    state = sampler.state_dict()
    assert state == {"epoch": 2, "batch": stop}
    resumed = made()
    resumed.load_state_dict(state)
    if again:
        resumed.set_epoch(2)  # as a loop over epochs does; it is the epoch's middle still
    assert first + list(resumed) == list(sampler)
    assert list(resumed) == list(sampler)  # and then from the start
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert resumed.state_dict() == {"epoch": 3, "batch": 0}
    assert len(list(resumed)) == len(sampler)


def test_looking_at_the_first_batch_does_not_move_the_start():
    sampler = ClassBalancedBatchSampler(torch.arange(4).repeat(5), 2, 2)
    first = next(iter(sampler))
    assert next(iter(sampler)) == first


@pytest.mark.parametrize("workers", [0, 2])
def test_it_feeds_a_loader(workers):
    labels = torch.arange(6).repeat(9)
    sampler = ClassBalancedBatchSampler(labels, 3, 4)
    loader = DataLoader(TensorDataset(torch.arange(54), labels), batch_sampler=sampler, num_workers=workers)
    batches = list(loader)
    assert len(loader) == len(batches) == len(sampler)
    assert [rows.tolist() for rows, _ in batches] == list(sampler)
    assert all(torch.equal(labels[rows], classes) for rows, classes in batches)
    sampler.load_state_dict({"epoch": 0, "batch": 2})
    assert [rows.tolist() for rows, _ in loader] == list(sampler)[2:]
    assert [rows.tolist() for rows, _ in loader] == list(sampler)


LABELS = torch.arange(6).repeat(4)


@pytest.mark.parametrize(
    ("kind", "text", "arguments"),
    [
        (TypeError, "labels must be int64 of shape [N] with N >= 1, got list", {"labels": [0, 1]}),
        (
            TypeError,
            "labels must be int64 of shape [N] with N >= 1, got float32 [24]",
            {"labels": LABELS.float()},
        ),
        (
            ValueError,
            "labels must be int64 of shape [N] with N >= 1, got int64 [1, 24]",
            {"labels": LABELS[None]},
        ),
        (ValueError, "labels must be int64 of shape [N] with N >= 1, got int64 [0]", {"labels": LABELS[:0]}),
        (TypeError, "classes_per_batch must be an integer >= 1, got float 2.0", {"classes_per_batch": 2.0}),
        (ValueError, "classes_per_batch must be an integer >= 1, got int 0", {"classes_per_batch": 0}),
        (ValueError, "samples_per_class must be an integer >= 1, got int -1", {"samples_per_class": -1}),
        (ValueError, "num_replicas must be an integer >= 1, got int 0", {"num_replicas": 0}),
        (ValueError, "rank must be an integer from 0 to 1, got int 2", {"num_replicas": 2, "rank": 2}),
        (ValueError, "rank must be an integer from 0 to 0, got int -1", {"rank": -1}),
        (ValueError, f"seed must be an integer from 0 to {2**63 - 1}, got int -1", {"seed": -1}),
        (TypeError, "split_classes must be True or False, got int 1", {"split_classes": 1}),
        (
            ValueError,
            "labels must be of at least classes_per_batch x num_replicas = 8 classes, got 6",
            {"classes_per_batch": 4, "num_replicas": 2},
        ),
        (
            ValueError,
            "samples_per_class must be a multiple of num_replicas 2 to be split, got int 3",
            {"samples_per_class": 3, "num_replicas": 2, "split_classes": True},
        ),
    ],
)
def test_errors(kind, text, arguments):
    with pytest.raises(kind) as caught:
        ClassBalancedBatchSampler(
            **({"labels": LABELS, "classes_per_batch": 2, "samples_per_class": 2} | arguments)
        )
    assert str(caught.value) == f"ClassBalancedBatchSampler: {text}"


@pytest.mark.parametrize(
    ("kind", "text", "state"),
    [
        (TypeError, 'state must be a dict of "epoch" and "batch", got None', None),
        (TypeError, 'state must be a dict of "epoch" and "batch", got a dict of [\'epoch\']', {"epoch": 1}),
        (
            ValueError,
            f'state["epoch"] must be an integer from 0 to {2**63 - 1}, got int -1',
            {"epoch": -1, "batch": 0},
        ),
        (ValueError, 'state["batch"] must be an integer from 0 to 6, got int 7', {"epoch": 0, "batch": 7}),
    ],
)
def test_errors_of_states(kind, text, state):
    sampler = ClassBalancedBatchSampler(LABELS, 2, 2)
    with pytest.raises(kind) as caught:
        sampler.load_state_dict(state)
    assert str(caught.value) == f"ClassBalancedBatchSampler.load_state_dict: {text}"
    with pytest.raises(ValueError, match=r"set_epoch: epoch must be an integer from 0"):
        sampler.set_epoch(-1)
