"""What each rank reads in an evaluation: every sample once over all ranks, in equally many steps on each.

[Note: ranks keep step] In ``stage3`` every step gathers parameters, in every stage it compares buffers, and it may hold
an exchange of the user's own: a rank that takes a step less than the others leaves them waiting for ever. torch's
``DistributedSampler`` therefore evens the ranks out by reading some samples twice, which then count twice. Here:

1. A DataLoader that it divides is divided without repeats (``OnceSampler``). Ranks differ by one sample at most, and
   one that has nothing left for the last step keeps a sample of its last batch for it (``EvenBatches``). So each step
   reads what a step of one process with batches of all ranks together reads, the last two steps apart.
2. That cannot be with batches of one sample, with fewer samples than ranks, or where the user divides the data. There a
   rank that has run out repeats its last batch until all have (``EvenBatches``, ``InStep``), and the strategy takes
   care that a repeated batch does not count (``loading``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from lit_zero.comm.world import World
from lit_zero.core.errors import LitZeroError
from lit_zero.strategy.flavour import (
    DistributedSamplerWrapper,
    UnrepeatedDistributedSamplerWrapper,
    _IndexBatchSamplerWrapper,
    _set_sampler_epoch,
)

# A user's own kind of sampler may mean something by its repeats.
_DIVIDED = (DistributedSampler, DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper)
_END = object()


class OnceSampler(Sampler[int]):
    """One rank's share of the samples, none of them twice: every ``ranks``-th, in the order of another sampler.

    Args:
        divided: the sampler that divides the samples so far; its order is kept, its repeats are not.
    """

    def __init__(self, divided: DistributedSampler[Any]) -> None:
        self.rank, self.ranks = divided.rank, divided.num_replicas
        self.total = len(divided.dataset)  # type: ignore[arg-type]
        # What wraps a sampler takes its order from there, and that may be drawn from each rank's own random state.
        self._drawn = type(divided) is not DistributedSampler
        self._everyones = copy.copy(divided)  # in a world of one, a sampler of this kind gives all samples, none twice
        vars(self._everyones).update(rank=0, num_replicas=1, num_samples=self.total, total_size=self.total)

    def everyones(self) -> list[int]:
        """Return the samples of all ranks, in order. All ranks call this together."""
        order = list(self._everyones)
        return list(World().broadcast_object(order)) if self._drawn else order

    def __iter__(self) -> Iterator[int]:
        return iter(self.everyones()[self.rank :: self.ranks])

    def __len__(self) -> int:
        return len(range(self.rank, self.total, self.ranks))

    def set_epoch(self, epoch: int) -> None:
        """Let a shuffled order be that of ``epoch``."""
        self._everyones.set_epoch(epoch)


class EvenBatches(Sampler[list[int]]):
    """Batches of one rank's share of the samples, equally many on every rank.

    Args:
        sampler: the share.
        batch_size: samples per batch.
        drop_last: leave out what fills no batch, on every rank alike.
        limit: steps that will be run, or their fraction, as in ``Trainer(limit_val_batches=...)``.

    Attributes:
        counted: batches that count; further ones repeat samples to keep step.
    """

    def __init__(self, sampler: OnceSampler, batch_size: int, drop_last: bool, limit: int | float = 1.0) -> None:
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, drop_last
        if drop_last:
            self._steps = sampler.total // sampler.ranks // batch_size
        else:
            self._steps = -(-sampler.total // (sampler.ranks * batch_size))
        self.counted = min(self._steps, len(sampler))
        # A last step that is never run needs no sample of the one before.
        self._all_run = (int(self._steps * limit) if isinstance(limit, float) else limit) >= self._steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        everyones = self.sampler.everyones()
        own = everyones[self.sampler.rank :: self.sampler.ranks]
        batches = [own[first : first + self.batch_size] for first in range(0, len(own), self.batch_size)][: self._steps]
        if self._all_run and len(batches) < self.counted:
            batches.append([batches[-1].pop()])
        while len(batches) < self._steps:
            batches.append(list(batches[-1]) if batches else everyones[:1])
        return iter(batches)


class InStep:
    """A loader that goes on until those of all ranks have ended; a rank that has run out repeats its last batch.

    Everything else is asked of the loader itself.

    Args:
        loader: this rank's.
        length: batches of the longest loader of all ranks, ``None`` if one of them does not know.
        agree: given whether this rank has a batch; returns whether any rank has, and whether all have. Called by all
            ranks together.

    Attributes:
        counted: batches of this rank's own, ``None`` while they have not ended.
    """

    def __init__(self, loader: Iterable[Any], length: int | None, agree: Callable[[bool], tuple[bool, bool]]) -> None:
        vars(self).update(_loader=loader, _length=length, _agree=agree, counted=None)

    def __getattr__(self, name: str) -> Any:
        if "_loader" not in vars(self):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self._loader, name, value)

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("The loader of a rank does not know its length.")
        return int(self._length)

    def __iter__(self) -> Iterator[Any]:
        self.counted = None
        batches, batch, number = iter(self._loader), None, 0
        while True:
            if self.counted is None:
                following = next(batches, _END)
                if following is _END:
                    self.counted = number
                else:
                    batch = following
            some, everyone = self._agree(self.counted is None)
            if not some:
                return
            if number == 0 and not everyone:
                raise LitZeroError(NO_BATCH)
            number += 1
            yield batch


NO_BATCH = (
    "A rank has no batch of the evaluation data at all while others have, so it cannot take part in their steps. Give "
    "every rank at least one batch, or use fewer devices. Where the data is a DataLoader over a dataset with a length, "
    "Trainer(use_distributed_sampler=True) divides it so that no rank is left without."
)


def divide(loader: DataLoader[Any], rank: int, ranks: int, limit: int | float = 1.0) -> DataLoader[Any]:
    """Return ``loader``, or, if Lightning or the user divides it by torch's kind of sampler, a copy that reads no
    sample twice.

    Args:
        loader: as Lightning has prepared it.
        rank: this rank.
        ranks: number of ranks.
        limit: as in :class:`EvenBatches`.
    """
    outer: Any = loader.batch_sampler
    # In predictions, Lightning notes the indices of every batch.
    inner = outer._batch_sampler if isinstance(outer, _IndexBatchSamplerWrapper) else outer
    divided: Any = loader.sampler if inner is None else getattr(inner, "sampler", None)
    if type(divided) not in _DIVIDED or (divided.rank, divided.num_replicas) != (rank, ranks) or divided.drop_last:
        return loader
    once = OnceSampler(divided)
    found: dict[str, Any] = {"_iterator": None, "sampler": once if loader.sampler is divided else loader.sampler}
    if inner is not None:
        if type(inner) is BatchSampler:
            batches: Any = EvenBatches(once, inner.batch_size, inner.drop_last, limit)
        else:
            batches = _changed(inner, sampler=once)
        found["batch_sampler"] = batches if inner is outer else _changed(outer, _batch_sampler=batches, sampler=once)
    return _changed(loader, **found)


def _changed(value: Any, **attributes: Any) -> Any:
    """Return a shallow copy with other attributes, some of which a DataLoader does not let be set."""
    other = copy.copy(value)
    vars(other).update(attributes)
    return other


def known_length(loader: Any) -> tuple[int | None, bool]:
    """Return how many batches a loader has, ``None`` if it does not know, and whether that can be relied on."""
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        return None, False
    return length, not isinstance(getattr(loader, "dataset", None), IterableDataset)


def counted_steps(loader: Any) -> int | None:
    """Return after how many steps a loader repeats what it has read, ``None`` if it has not come to that."""
    if isinstance(loader, InStep):
        return loader.counted
    batches = getattr(loader, "batch_sampler", None)
    batches = getattr(batches, "_batch_sampler", batches)
    return batches.counted if isinstance(batches, EvenBatches) else None


def draw_resumed_epoch(trainer: Any) -> None:
    """Let the first epoch after a resume be shuffled as the epoch that it is.

    Lightning makes the iterator before it tells samplers which epoch it is, and worker processes draw ahead, so they
    have drawn the order of epoch 0 (Lightning issue 21938). Loaders that restore their own position are left alone.
    """
    loop = trainer.fit_loop
    epoch = loop.epoch_progress.current.processed
    if epoch == 0 or not (loop.is_resuming or loop.restarting) or loop._combined_loader is None:
        return
    loaders = loop._combined_loader.flattened
    if any(hasattr(each, "load_state_dict") for each in loaders):
        return
    if any(getattr(each, "num_workers", 0) for each in loaders):
        for each in loaders:
            _set_sampler_epoch(each, epoch)
        iter(loop._data_fetcher)
