"""What the ZeRO engine asks of communication: gather flat parameters, reduce flat gradients, and count what was sent.

An exchange moves *lanes*: a unit has one flat buffer per dtype, and all of a unit's lanes travel in one call. Calls are
made in the same order on every rank and finish in that order. Buffers handed to a call belong to it until its ticket
has been waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_zero.core.ticket import DONE, Done, Ticket

__all__ = ["Counters", "Done", "Exchange", "Gather", "Reduce", "Swap", "Ticket", "finish_sum"]


@dataclass(frozen=True)
class Gather:
    """One lane to gather.

    Attributes:
        full: receives the whole lane, shape ``[world * n]``.
        own: this rank's part, shape ``[n]``; may be the rank's own slice of ``full`` or lie elsewhere.
        ready: what brings ``own``; it is waited for before ``own`` is read.
    """

    full: torch.Tensor
    own: torch.Tensor
    ready: Ticket = DONE


@dataclass(frozen=True)
class Reduce:
    """One lane to sum over ranks and cut into shards.

    Attributes:
        full: this rank's whole gradient, shape ``[world * n]``; its content is undefined afterwards, except ``own``
            where it lies inside.
        own: receives this rank's part of the sum, shape ``[n]``, in its own dtype; may be the rank's slice of ``full``.
        scale: the sum is multiplied by this.
        accumulate: add to what ``own`` holds instead of overwriting it (``own`` must then lie outside ``full``).
        whole: gather the summed parts back into ``full`` on every rank (an all-reduce); ``own`` must then be the slice
            of ``full``.
    """

    full: torch.Tensor
    own: torch.Tensor
    scale: float = 1.0
    accumulate: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Swap:
    """What every rank sends to every other one.

    Attributes:
        sent: what goes to each rank, in rank order; any lengths, one dtype.
        received: receives what each rank sends here, as long as that is.
    """

    sent: Sequence[torch.Tensor]
    received: Sequence[torch.Tensor]


@dataclass
class Counters:
    """What this rank has sent since the last ``reset``.

    Attributes:
        sent_elements: elements sent to other ranks.
        sent_bytes: the same in bytes.
        gathers: gather calls.
        reductions: reduction calls.
        swaps: calls in which each rank sends something of its own to each.
    """

    sent_elements: int = 0
    sent_bytes: int = 0
    gathers: int = 0
    reductions: int = 0
    swaps: int = 0

    def count(self, part: torch.Tensor, peers: int) -> None:
        """Note that ``part`` (shape ``[n]``) goes to ``peers`` other ranks."""
        self.sent_elements += part.numel() * peers
        self.sent_bytes += part.numel() * part.element_size() * peers

    def reset(self) -> None:
        """Start counting anew."""
        self.sent_elements = self.sent_bytes = self.gathers = self.reductions = self.swaps = 0


class Exchange:
    """The exchange of a world of one rank: nothing travels. Base class of the others.

    Attributes:
        rank: this rank on the data-parallel axis.
        size: ranks on the data-parallel axis.
        counters: what was sent.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.counters = Counters()

    def all_gather(self, lanes: Sequence[Gather]) -> Ticket:
        """Fill every lane's ``full`` with all ranks' ``own``, in rank order."""
        if any(lane.ready is not DONE for lane in lanes):
            return _Arriving(lanes)  # what brings them runs beside the computation
        _fill(lanes)
        return Done()

    def reduce_scatter(self, lanes: Sequence[Reduce]) -> Ticket:
        """Sum every lane over ranks, in rank order, and leave each rank its part."""
        for lane in lanes:
            finish_sum(lane, lane.full)
        return Done()

    def all_to_all(self, swap: Swap) -> Ticket:
        """Fill every tensor of ``received`` with what that rank sends to this one."""
        swap.received[0].copy_(swap.sent[0])
        return Done()

    def sum_in_rank_order(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a small tensor over all ranks; the order of addition is the rank order, so every rank
        gets the same bits.
        """
        return value

    def maximum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the elementwise maximum of a small tensor over all ranks."""
        return value

    def broadcast(self, value: torch.Tensor) -> None:
        """Overwrite ``value`` with rank 0's, in place."""

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return zeros, shape ``[numel]``, for good, where other ranks can get at them best. All ranks alike."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def borrow(self, size: int, device: torch.device) -> torch.Tensor:
        """Return a buffer of dtype uint8, shape ``[size]``, for a while. All ranks alike; its content is undefined."""
        return torch.empty(size, dtype=torch.uint8, device=device)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take what ``borrow`` gave; no call on it is under way."""

    def close(self) -> None:
        """Wait for what is under way and end threads; the exchange is not used afterwards."""


class _Arriving:
    """The ticket of a gather of one rank whose own part is still to come."""

    def __init__(self, lanes: Sequence[Gather]) -> None:
        self._lanes = lanes

    def wait(self) -> None:
        for lane in self._lanes:
            lane.ready.wait()
        _fill(self._lanes)
        self._lanes = []


def _fill(lanes: Sequence[Gather]) -> None:
    with torch.no_grad():
        for lane in lanes:
            if lane.full.data_ptr() != lane.own.data_ptr():
                lane.full.copy_(lane.own)


def finish_sum(lane: Reduce, total: torch.Tensor) -> None:
    """Scale ``total`` (shape ``[n]``) and write or add it to ``lane.own``."""
    if lane.accumulate:
        lane.own.add_(total.to(lane.own.dtype), alpha=lane.scale)
    elif total.data_ptr() == lane.own.data_ptr() and total.dtype == lane.own.dtype:
        if lane.scale != 1.0:
            lane.own.mul_(lane.scale)
    elif lane.scale != 1.0:
        torch.mul(total, lane.scale, out=lane.own) if total.dtype == lane.own.dtype else lane.own.copy_(
            total * lane.scale
        )
    else:
        lane.own.copy_(total)
