"""Dividing data, checked by counting samples: no process group and no model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from lit_zero.core.errors import LitZeroError
from lit_zero.strategy.loaders import InStep, counted_steps, divide, known_length


def divided(rows: int, ranks: int, limit: int | float = 1.0, epoch: int = 0, **loader: Any) -> list[DataLoader[Any]]:
    """Return every rank's loader of the samples ``0 .. rows - 1``, divided as the strategy does."""
    found = []
    for rank in range(ranks):
        sampler = DistributedSampler(range(rows), ranks, rank, shuffle=loader.get("shuffle", False), seed=7)
        options = {key: value for key, value in loader.items() if key != "shuffle"}
        found.append(divide(DataLoader(range(rows), sampler=sampler, **options), rank, ranks, limit))
        found[-1].sampler.set_epoch(epoch)
    return found


def read(loader: DataLoader[Any]) -> list[list[int]]:
    """Return the samples of every batch that counts."""
    return [batch.reshape(-1).tolist() for batch in itertools.islice(loader, counted_steps(loader))]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_every_sample_counts_once_in_as_many_steps_on_every_rank(ranks, size):
    for rows in range(1, 4 * ranks * size):
        loaders = divided(rows, ranks, batch_size=size)
        steps = -(-rows // (ranks * size))
        assert [len(loader) for loader in loaders] == [len(list(loader)) for loader in loaders] == [steps] * ranks
        counted = [read(loader) for loader in loaders]
        assert sorted(itertools.chain(*itertools.chain(*counted))) == list(range(rows))
        if size > 1 and rows >= ranks:
            assert [len(batches) for batches in counted] == [steps] * ranks, "nothing is repeated"
        whole = [list(range(rows))[k * ranks * size : (k + 1) * ranks * size] for k in range(steps)]
        together = [sorted(itertools.chain(*batches)) for batches in zip(*counted, strict=False)]
        assert together[: steps - 2] == whole[: steps - 2], "every step but the last two reads what one process reads"


@pytest.mark.parametrize("rows", range(1, 30))
def test_incomplete_batches_are_left_out_on_every_rank_alike(rows):
    loaders = divided(rows, 3, batch_size=2, drop_last=True)
    counted = [read(loader) for loader in loaders]
    assert {len(batch) for batches in counted for batch in batches} <= {2}
    assert sorted(itertools.chain(*itertools.chain(*counted))) == list(range(rows // 6 * 6))


@pytest.mark.parametrize("limit", [2, 0.7])
def test_a_limit_before_the_last_step_leaves_the_others_whole(limit):
    loaders = divided(17, 2, limit, batch_size=4)  # 9 and 8 samples: 4, 4, 1 and 4, 4
    assert [len(loader) for loader in loaders] == [3, 3]
    assert [[len(batch) for batch in itertools.islice(loader, 2)] for loader in loaders] == [[4, 4], [4, 4]]
    unlimited = divided(17, 2, batch_size=4)
    assert [[len(batch) for batch in loader] for loader in unlimited] == [[4, 4, 1], [4, 3, 1]]


def test_a_shuffled_order_is_torchs_own_and_another_one_in_every_epoch():
    orders = []
    for epoch in range(2):
        whole = DistributedSampler(range(11), 1, 0, shuffle=True, seed=7)
        whole.set_epoch(epoch)
        loaders = divided(11, 2, batch_size=3, shuffle=True, epoch=epoch)
        shares = [list(itertools.chain(*read(loader))) for loader in loaders]
        orders.append(list(whole))
        assert shares == [orders[-1][0::2], orders[-1][1::2]]
    assert orders[0] != orders[1]


def test_samples_that_are_not_put_into_batches():
    loaders = divided(5, 2, batch_size=None)
    assert [list(loader) for loader in loaders] == [[0, 2, 4], [1, 3]]


class Pairs(BatchSampler):
    """A user's own batch sampler."""

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[::-1]


def test_a_batch_sampler_of_the_users_own_gets_a_sampler_that_does_not_repeat():
    found = []
    for rank in range(2):
        batches = Pairs(DistributedSampler(range(5), 2, rank, shuffle=False), 2, drop_last=False)
        loader = DataLoader(range(5), batch_sampler=batches)
        found.append([batch.tolist() for batch in divide(loader, rank, 2)])
        assert sum(len(batch) for batch in loader) == 3, "the user's own loader stays as it is"
    assert found == [[[2, 0], [4]], [[3, 1]]]


def test_a_sampler_of_the_users_own_is_divided_in_its_order():
    order = [4, 0, 2, 1, 3]
    found = []
    for rank in range(2):
        sampler = DistributedSamplerWrapper(order, num_replicas=2, rank=rank, shuffle=False)
        found.append([batch.tolist() for batch in divide(DataLoader(range(5), 2, sampler=sampler), rank, 2)])
    assert found == [[[4, 2], [3]], [[0], [1]]]


class Weighted(DistributedSampler[int]):
    """A user's own kind."""


@pytest.mark.parametrize(
    "sampler",
    [
        Weighted(range(5), 2, 0),
        DistributedSampler(range(5), 3, 0),
        DistributedSampler(range(5), 2, 0, drop_last=True),
        None,
    ],
    ids=["own kind", "other ranks", "drop_last", "none"],
)
def test_what_means_something_else_is_left_alone(sampler: Sampler[int] | None):
    loader = DataLoader(range(5), 2, sampler=sampler)
    assert divide(loader, 0, 2) is loader


# ---- loaders whose lengths differ


def among(own: int, *others: int) -> Callable[[bool], tuple[bool, bool]]:
    """Return the agreement of a rank with ``own`` batches among ranks with other numbers of them."""
    step = itertools.count()

    def agree(more: bool) -> tuple[bool, bool]:
        number = next(step)
        assert more == (number < own)
        have = [more, *(number < other for other in others)]
        return any(have), all(have)

    return agree


@pytest.mark.parametrize(("own", "others"), [(2, (4,)), (4, (2,)), (1, (3, 2)), (3, (3,))])
def test_a_rank_repeats_its_last_batch_until_all_have_ended(own, others):
    loader = InStep(list("abcd")[:own], None, among(own, *others))
    steps = max(own, *others)
    read = []
    for number, batch in enumerate(loader):
        assert (counted_steps(loader) is None) == (number < own)
        read.append(batch)
    assert read == [*"abcd"[:own], *("abcd"[own - 1] * (steps - own))]
    assert counted_steps(loader) == own


def test_a_rank_without_any_batch_is_refused_on_all():
    for own, other in ((0, 2), (2, 0)):
        with pytest.raises(LitZeroError, match="A rank has no batch of the evaluation data at all while others"):
            next(iter(InStep([1, 2][:own], None, among(own, other))))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Counted(Stream):
    def __len__(self) -> int:
        return 3


def test_lengths_that_can_be_relied_on():
    assert known_length(DataLoader(range(5), 2)) == (3, True)
    assert known_length([1, 2]) == (2, True)
    assert known_length(DataLoader(Stream(), 2)) == (None, False)
    assert known_length(DataLoader(Counted(), 2)) == (2, False)
    assert known_length(iter([])) == (None, False)


def test_everything_else_is_asked_of_the_loader_itself():
    loader = DataLoader(range(5), 2)
    wrapped = InStep(loader, 4, among(3, 4))
    assert len(wrapped) == 4
    assert wrapped.batch_size == 2 and wrapped.dataset is loader.dataset
    wrapped.worker_init_fn = torch.manual_seed
    assert loader.worker_init_fn is torch.manual_seed
    assert not hasattr(wrapped, "nothing")
    with pytest.raises(TypeError, match="does not know its length"):
        len(InStep(loader, None, among(3, 4)))
