"""The exchange on CPU: ranks send to one another directly and add in rank order, beside the computation.

gloo's own collectives are slow (its ``reduce_scatter`` is a clone, an all-reduce and a slice) and add in ring order. Here every rank
sends each peer the part that the peer owns and adds what arrives in the order of the ranks, so a sum does not depend on who came
first. One thread owns the exchange and takes the calls one after the other; the order of calls is the same on every rank, which is
all the matching that messages need.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
import torch.distributed as dist

from lit_zero.comm.exchange import Done, Exchange, Gather, Reduce, Ticket, finish_sum


class _Pending:
    """The ticket of a job on the communication thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class DirectExchange(Exchange):
    """Gather and reduce by direct send and receive over a gloo group.

    Args:
        group: a gloo process group that nothing else uses.
        overlap: run the calls on a thread of their own; else each call returns when it is complete.
    """

    def __init__(self, group: dist.ProcessGroup, overlap: bool = True) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._scratch = torch.empty(0, dtype=torch.uint8)  # receives the peers' parts of one lane, [bytes]
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if overlap:
            # A daemon: a rank whose peer has died must be able to exit while this thread still waits for that peer.
            self._thread = threading.Thread(target=self._work, name="lit_zero-exchange", daemon=True)
            self._thread.start()

    def all_gather(self, lanes: Sequence[Gather]) -> Ticket:
        self.counters.gathers += 1
        for lane in lanes:
            self.counters.count(lane.own, self.size - 1)
        return self._submit(lambda: self._gather(lanes))

    def reduce_scatter(self, lanes: Sequence[Reduce]) -> Ticket:
        self.counters.reductions += 1
        for lane in lanes:
            part = lane.full[: lane.full.numel() // self.size]
            self.counters.count(part, self.size - 1)
            if lane.whole:
                self.counters.count(part, self.size - 1)
        return self._submit(lambda: self._reduce(lanes))

    def sum_in_rank_order(self, value: torch.Tensor) -> torch.Tensor:
        return self._everyones(value).sum(0)

    def maximum(self, value: torch.Tensor) -> torch.Tensor:
        return self._everyones(value).amax(0)

    def broadcast(self, value: torch.Tensor) -> None:
        def job() -> None:
            if self.rank == 0:
                works = [dist.isend(value, group=self._group, group_dst=peer) for peer in self._peers]
            else:
                works = [dist.irecv(value, group=self._group, group_src=0)]
            _wait(works)

        self._submit(job).wait()

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=10)
            self._thread = None

    def _everyones(self, value: torch.Tensor) -> torch.Tensor:
        """Return every rank's ``value``, shape ``[world, *value.shape]``."""
        full = torch.empty(self.size * value.numel(), dtype=value.dtype)
        own = value.detach().reshape(-1).clone()
        self._submit(lambda: self._gather([Gather(full, own)])).wait()
        return full.view(self.size, *value.shape)

    def _gather(self, lanes: Sequence[Gather]) -> None:
        works = []
        for lane in lanes:
            parts = lane.full.view(self.size, -1)
            works += [dist.irecv(parts[peer], group=self._group, group_src=peer) for peer in self._peers]
            works += [dist.isend(lane.own, group=self._group, group_dst=peer) for peer in self._peers]
        for lane in lanes:
            mine = lane.full.view(self.size, -1)[self.rank]
            if mine.data_ptr() != lane.own.data_ptr():
                mine.copy_(lane.own)
        _wait(works)

    def _reduce(self, lanes: Sequence[Reduce]) -> None:
        for lane in lanes:
            parts = lane.full.view(self.size, -1)  # [world, n]
            inbox = self._inbox(parts)
            recvs = {peer: dist.irecv(inbox[peer], group=self._group, group_src=peer) for peer in self._peers}
            sends = [dist.isend(parts[peer], group=self._group, group_dst=peer) for peer in self._peers]
            total = parts[0] if self.rank == 0 else inbox[0]
            for rank in range(self.size):
                if rank in recvs:
                    recvs[rank].wait()
                if rank > 0:
                    part = parts[rank] if rank == self.rank else inbox[rank]
                    straight = rank == self.size - 1 and not lane.accumulate and lane.own.dtype == part.dtype
                    total = _add(total, part, out=lane.own if straight else None)
            finish_sum(lane, total)
            _wait(sends)
            if lane.whole:
                self._gather([Gather(lane.full, lane.own)])

    def _inbox(self, parts: torch.Tensor) -> torch.Tensor:
        """Return scratch like ``parts`` (shape ``[world, n]``); it is free again when the job is done."""
        needed = parts.numel() * parts.element_size()
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        return self._scratch[:needed].view(parts.dtype).view(parts.shape)

    def _submit(self, job: Callable[[], None]) -> Ticket:
        if self._thread is None:
            with torch.no_grad():
                job()
            return Done()
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return _Pending(future)

    def _work(self) -> None:
        torch.set_num_threads(1)  # the computation keeps its cores
        torch.set_grad_enabled(False)  # this thread's own switch
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                job()
                future.set_result(None)
            except BaseException as error:  # the caller's wait() raises it
                future.set_exception(error)


def _add(total: torch.Tensor, part: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Return ``total + part``, in ``out`` if given, else in ``total``; 2-byte gradients are added in fp32."""
    if part.element_size() < 4:
        return total.float().add_(part.float())
    return torch.add(total, part, out=total if out is None else out)


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
