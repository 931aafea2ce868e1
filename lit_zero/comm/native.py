"""The exchange on GPUs: torch's own collectives on NCCL, on streams of their own.

Parameters and gradients use one process group each, because calls on one NCCL communicator run one after the other. The
class itself knows no NCCL: on a gloo group it runs without streams, which is how it is tested on CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from lit_zero.comm import process_group
from lit_zero.comm.compat import all_gather_single, reduce_scatter_single
from lit_zero.comm.exchange import Done, Exchange, Gather, Reduce, Swap, Ticket, finish_sum


class _StreamTicket:
    """The ticket of work queued on a side stream: the caller's stream waits, the host does not."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)


class _Lane:
    """A process group and the stream on which its collectives run (no stream: in line)."""

    def __init__(self, group: dist.ProcessGroup, stream: Any) -> None:
        self.group, self.stream = group, stream

    def enter(self) -> AbstractContextManager[Any]:
        """Run what follows on this stream, after everything the caller has launched so far."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def ticket(self) -> Ticket:
        return Done() if self.stream is None else _StreamTicket(self.stream.record_event())


class NativeExchange(Exchange):
    """Gather and reduce by the backend's collectives.

    Args:
        gather_group: group for parameters.
        reduce_group: group for gradients; the same ranks in the same order.
        device: this rank's device.
        overlap: use side streams (CUDA only).
        reduce_dtype: 2-byte gradients are summed in this dtype (``None``: in their own).
    """

    def __init__(
        self,
        gather_group: dist.ProcessGroup,
        reduce_group: dist.ProcessGroup,
        device: torch.device,
        overlap: bool = True,
        reduce_dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(gather_group), dist.get_world_size(gather_group)
        self._reduce_dtype = reduce_dtype
        self._closed = False
        streams = [torch.cuda.Stream(device) if overlap and device.type == "cuda" else None for _ in range(2)]
        self._gathers, self._reductions = _Lane(gather_group, streams[0]), _Lane(reduce_group, streams[1])

    def all_gather(self, lanes: Sequence[Gather]) -> Ticket:
        self.counters.gathers += 1
        for lane in lanes:
            lane.ready.wait()
        with torch.no_grad(), self._gathers.enter():
            for lane in lanes:
                self.counters.count(lane.own, self.size - 1)
                all_gather_single(lane.full, lane.own, group=self._gathers.group)
            return self._gathers.ticket()

    def reduce_scatter(self, lanes: Sequence[Reduce]) -> Ticket:
        self.counters.reductions += 1
        with torch.no_grad(), self._reductions.enter():
            for lane in lanes:
                self._reduce(lane)
            return self._reductions.ticket()

    def _reduce(self, lane: Reduce) -> None:
        full = lane.full
        if self._reduce_dtype is not None and full.element_size() < 4:
            full = full.to(self._reduce_dtype)
        part = full.view(self.size, -1)[self.rank]
        self.counters.count(part, self.size - 1)
        # In place where the result may land in the rank's own slice, else straight into the shard.
        straight = not lane.accumulate and lane.own.dtype == full.dtype
        total = lane.own if straight else part
        reduce_scatter_single(total, full, group=self._reductions.group)
        finish_sum(lane, total)
        if lane.whole:
            self.counters.count(lane.own, self.size - 1)
            all_gather_single(lane.full, lane.own, group=self._reductions.group)

    def all_to_all(self, swap: Swap) -> Ticket:
        self.counters.swaps += 1
        for peer, tensor in enumerate(swap.sent):
            self.counters.count(tensor, int(peer != self.rank))
        coming, going = ([tensor.numel() for tensor in tensors] for tensors in (swap.received, swap.sent))
        with torch.no_grad(), self._reductions.enter():
            sent, received = torch.cat(list(swap.sent)), swap.received[0].new_empty(sum(coming))
            dist.all_to_all_single(received, sent, coming, going, group=self._reductions.group)
            for tensor, part in zip(swap.received, received.split(coming), strict=True):
                tensor.copy_(part)
            return self._reductions.ticket()

    def sum_in_rank_order(self, value: torch.Tensor) -> torch.Tensor:
        return self._everyones(value).sum(0)

    def maximum(self, value: torch.Tensor) -> torch.Tensor:
        return self._everyones(value).amax(0)

    def broadcast(self, value: torch.Tensor) -> None:
        wire = value.contiguous()
        dist.broadcast(wire, group=self._reductions.group, group_src=0)  # not behind gathers that are on their way
        if wire is not value:
            value.copy_(wire)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            process_group.leave(self._gathers.group, self._reductions.group)

    def _everyones(self, value: torch.Tensor) -> torch.Tensor:
        """Return every rank's ``value``, shape ``[world, *value.shape]``."""
        full = torch.empty(self.size * value.numel(), dtype=value.dtype, device=value.device)
        all_gather_single(full, value.detach().reshape(-1).contiguous(), group=self._reductions.group)
        return full.view(self.size, *value.shape)
