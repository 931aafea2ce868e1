"""The exchange on CPU: ranks send to one another directly and add in rank order, beside the computation.

gloo's own collectives are slow (its ``reduce_scatter`` is a clone, an all-reduce and a slice) and add in ring order.
Here every rank sends each peer the part that the peer owns and adds what arrives in the order of the ranks, so a sum
does not depend on who came first. One thread owns the exchange and takes the calls one after the other; the order of
calls is the same on every rank, which is all the matching that messages need.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
import torch.distributed as dist

from lit_zero.comm.exchange import Done, Exchange, Gather, Reduce, Ticket, finish_sum

_CHUNK_BYTES = 1 << 18  # a sum works on chunks of this size: they stay in the cache between arriving and being added


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
        reduce_dtype: 2-byte gradients are added in this dtype (``None``: in their own).
    """

    def __init__(
        self, group: dist.ProcessGroup, overlap: bool = True, reduce_dtype: torch.dtype | None = torch.float32
    ) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._reduce_dtype = reduce_dtype
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
        wire = value
        if value.is_inference():  # the communication thread may not write to it
            with torch.inference_mode(False):
                wire = value.clone()

        def job() -> None:
            if self.rank == 0:
                works = [dist.isend(wire, group=self._group, group_dst=peer) for peer in self._peers]
            else:
                works = [dist.irecv(wire, group=self._group, group_src=0)]
            _wait(works)

        self._submit(job).wait()
        if wire is not value:
            value.copy_(wire)

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=10)
            self._thread = None

    def _everyones(self, value: torch.Tensor) -> torch.Tensor:
        """Return every rank's ``value``, shape ``[world, *value.shape]``."""
        with torch.inference_mode(False):  # or the communication thread, which is not in it, may not write to them
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
            self._sum(lane, parts)
            if lane.whole:
                self._gather([Gather(lane.full, lane.own)])

    def _sum(self, lane: Reduce, parts: torch.Tensor) -> None:
        """Add the ranks' parts, chunk by chunk: the next chunk arrives while this one is added, and little memory is
        needed.
        """
        size = max(_CHUNK_BYTES // parts.element_size(), 1)
        chunks = [slice(first, min(first + size, parts.shape[1])) for first in range(0, parts.shape[1], size)]
        inboxes = [torch.empty(self.size, min(size, parts.shape[1]), dtype=parts.dtype) for _ in chunks[:2]]
        sends = [
            dist.isend(parts[peer, chunk], group=self._group, group_dst=peer)
            for chunk in chunks
            for peer in self._peers
        ]

        def receive(number: int) -> dict[int, tuple[dist.Work | None, torch.Tensor]]:
            chunk, inbox = chunks[number], inboxes[number % 2]
            arriving = {peer: inbox[peer, : chunk.stop - chunk.start] for peer in self._peers}
            return {
                peer: (dist.irecv(part, group=self._group, group_src=peer), part) for peer, part in arriving.items()
            }

        coming = receive(0)
        for number, chunk in enumerate(chunks):
            here, coming = coming, receive(number + 1) if number + 1 < len(chunks) else {}
            own = lane.own[chunk]
            total = None
            for rank in range(self.size):
                if rank == self.rank:
                    part = parts[rank, chunk]
                else:
                    work, part = here[rank]
                    _wait([work])
                straight = rank == self.size - 1 and not lane.accumulate and own.dtype == part.dtype
                total = part if total is None else self._add(total, part, out=own if straight else None)
            assert total is not None
            finish_sum(replace(lane, own=own), total)
        _wait(sends)

    def _add(self, total: torch.Tensor, part: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Return ``total + part``, in ``out`` if given, else in ``total``; 2-byte gradients are added in the
        reduction's dtype.
        """
        if part.element_size() < 4 and self._reduce_dtype is not None:
            return total.to(self._reduce_dtype).add_(part.to(self._reduce_dtype))
        return torch.add(total, part, out=total if out is None else out)

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


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
