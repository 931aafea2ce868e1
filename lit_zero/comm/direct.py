"""The exchange on CPU: ranks read from or send to one another directly and add in rank order, beside the computation.

gloo's own collectives are slow (its ``reduce_scatter`` is a clone, an all-reduce and a slice) and add in ring order.
Here every rank takes from each peer the part that it needs, and adds in the order of the ranks, so a sum does not
depend on who came first. One thread owns the exchange and takes the calls one after the other; the order of calls is
the same on every rank, which is all the matching that messages need.

[Note: near and far peers] A peer of the same machine is *near*: its memory is read in place (``shared``), and messages
carry only where to look. A large call on memory that neighbours read goes in three steps: every rank tells its near
peers where its part lies, which says at once that it is complete; every rank reads what it needs; every rank tells its
near peers that it has read, and returns when all have told it: from then on it may overwrite its part. Far peers send
the bytes themselves, and so do near ones in a small call: two rounds of messages would cost more than the copies that
they save.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
import torch.distributed as dist

from lit_zero.comm import process_group
from lit_zero.comm.exchange import Done, Exchange, Gather, Reduce, Swap, Ticket, finish_sum
from lit_zero.comm.shared import Address, Neighbour, Place, make_arena

LARGE_BYTES = 1 << 20  # of a rank's part, from which near peers read in place
_CHUNK_BYTES = 1 << 18  # a sum works on chunks of this size: they stay in the cache between arriving and being added


Job = tuple[Callable[[], None], Future[None]]


class _Pending:
    """The ticket of a job on the communication thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class DirectExchange(Exchange):
    """Gather and reduce by shared memory and direct send and receive over a gloo group.

    Args:
        group: a gloo process group that nothing else uses.
        overlap: run the calls on a thread of their own; else each call returns when it is complete.
        reduce_dtype: 2-byte gradients are added in this dtype (``None``: in their own).
        shared_memory: read the memory of ranks on the same machine; else send messages to all.
        large: bytes of a rank's part from which that is done.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        overlap: bool = True,
        reduce_dtype: torch.dtype | None = torch.float32,
        shared_memory: bool = True,
        large: int = LARGE_BYTES,
    ) -> None:
        super().__init__()
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._peers = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._reduce_dtype, self._large = reduce_dtype, large
        self._closed = False
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if overlap:
            # A daemon: a rank whose peer has died must be able to exit while this thread still waits for that peer.
            # It holds the queue and not the exchange: what nobody uses any more can go, and takes the thread with it.
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name="lit_zero-exchange", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None)
        self._near: dict[int, Neighbour] = {}
        self._arena = make_arena() if shared_memory else None
        if shared_memory:
            self._meet()

    @property
    def near(self) -> list[int]:
        """The peers whose memory this rank reads."""
        return list(self._near)

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

    def all_to_all(self, swap: Swap) -> Ticket:
        self.counters.swaps += 1
        for peer in self._peers:
            self.counters.count(swap.sent[peer], 1)
        return self._submit(lambda: self._swap_all(swap))

    def sum_in_rank_order(self, value: torch.Tensor) -> torch.Tensor:
        return self._everyones(value).sum(0)

    def maximum(self, value: torch.Tensor) -> torch.Tensor:
        return self._everyones(value).amax(0)

    def broadcast(self, value: torch.Tensor) -> None:
        with torch.inference_mode(False):  # the communication thread may not write to what is made in that mode
            # What is sent and received into must lie in one piece.
            wire = value.clone() if value.is_inference() else value.contiguous()

        def job() -> None:
            if self.rank == 0:
                works = [dist.isend(wire, group=self._group, group_dst=peer) for peer in self._peers]
            else:
                works = [dist.irecv(wire, group=self._group, group_src=0)]
            _wait(works)

        self._submit(job).wait()
        if wire is not value:
            value.copy_(wire)

    def zeros(self, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if not self._near or self._arena is None:
            return super().zeros(numel, dtype, device)
        return self._arena.allocate(numel * dtype.itemsize).view(dtype)

    def borrow(self, size: int, device: torch.device) -> torch.Tensor:
        if not self._near or self._arena is None:
            return super().borrow(size, device)
        return self._arena.allocate(size)

    def give_back(self, buffer: torch.Tensor) -> None:
        if self._near and self._arena is not None:
            self._arena.give_back(buffer)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(timeout=10)
            self._thread = None
        process_group.leave(self._group)
        self._near = {}
        if self._arena is not None:
            self._arena.close()

    # ---- near peers

    def _meet(self) -> None:
        """Find out which peers are near: those that can open one another's memory, both ways."""
        address = torch.zeros(4, dtype=torch.int64) if self._arena is None else self._arena.address.encode()
        found = {}
        for peer, other in enumerate(map(Address.decode, self._everyones(address))):
            if peer != self.rank and other is not None and self._arena is not None:
                try:
                    found[peer] = Neighbour(other)
                except OSError:
                    continue
        opened = torch.tensor([peer in found for peer in range(self.size)], dtype=torch.uint8)
        mutual = self._everyones(opened)[:, self.rank].tolist()
        self._near = {peer: found[peer] for peer in self._peers if peer in found and mutual[peer]}

    def _places(self, tensors: Sequence[torch.Tensor], parts: int) -> list[Place]:
        """Return where the tensors lie for near peers, nothing if that is small, or one of them lies elsewhere. The
        same on every rank, since all allocate alike.

        Args:
            tensors: what peers would read.
            parts: of how many ranks.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if not self._near or self._arena is None or size < self._large * parts:
            return []
        places = [self._arena.locate(tensor) for tensor in tensors]
        return [] if None in places else [place for place in places if place is not None]

    def _meeting(self, places: Sequence[Place]) -> dict[int, list[Place]]:
        """Tell near peers where this rank's parts lie, and return where theirs do."""
        mine = torch.tensor([(place.segment, place.offset) for place in places], dtype=torch.int64)
        theirs = self._swap(mine)
        return {peer: [Place(*place) for place in places.tolist()] for peer, places in theirs.items()}

    def _swap(self, mine: torch.Tensor) -> dict[int, torch.Tensor]:
        """Send a small tensor to every near peer and return theirs."""
        theirs = {peer: torch.empty_like(mine) for peer in self._near}
        works = [dist.irecv(value, group=self._group, group_src=peer) for peer, value in theirs.items()]
        _wait([*works, *(dist.isend(mine, group=self._group, group_dst=peer) for peer in self._near)])
        return theirs

    def _part(self) -> None:
        """Return when every near peer has read what it needed."""
        self._swap(torch.zeros(1, dtype=torch.uint8))

    # ---- calls, on the communication thread

    def _everyones(self, value: torch.Tensor) -> torch.Tensor:
        """Return every rank's ``value``, shape ``[world, *value.shape]``."""
        with torch.inference_mode(False):  # they are written to in another thread, which is not in that mode
            full = torch.empty(self.size * value.numel(), dtype=value.dtype)
            own = value.detach().reshape(-1).clone()
        self._submit(lambda: self._gather([Gather(full, own)])).wait()
        return full.view(self.size, *value.shape)

    def _gather(self, lanes: Sequence[Gather]) -> None:
        for lane in lanes:
            lane.ready.wait()
        places = self._places([lane.own for lane in lanes], 1)
        far = [peer for peer in self._peers if not places or peer not in self._near]
        works = []
        for lane in lanes:
            parts = lane.full.view(self.size, -1)
            works += [dist.irecv(parts[peer], group=self._group, group_src=peer) for peer in far]
            works += [dist.isend(lane.own, group=self._group, group_dst=peer) for peer in far]
        for lane in lanes:
            mine = lane.full.view(self.size, -1)[self.rank]
            if mine.data_ptr() != lane.own.data_ptr():
                mine.copy_(lane.own)
        if places:
            for peer, theirs in self._meeting(places).items():
                for lane, place in zip(lanes, theirs, strict=True):
                    part = self._near[peer].look(place, lane.own.numel(), lane.own.dtype)
                    lane.full.view(self.size, -1)[peer].copy_(part)
            self._part()
        _wait(works)

    def _reduce(self, lanes: Sequence[Reduce]) -> None:
        places = self._places([lane.full for lane in lanes], self.size)
        near = self._meeting(places) if places else {}
        for number, lane in enumerate(lanes):
            parts = lane.full.view(self.size, -1)  # [world, n]
            looks = {
                peer: self._near[peer].look(theirs[number], lane.full.numel(), lane.full.dtype)
                for peer, theirs in near.items()
            }
            self._sum(lane, parts, {peer: look.view(self.size, -1)[self.rank] for peer, look in looks.items()})
        if places:
            self._part()
        whole = [Gather(lane.full, lane.own) for lane in lanes if lane.whole]
        if whole:
            self._gather(whole)

    def _sum(self, lane: Reduce, parts: torch.Tensor, near: Mapping[int, torch.Tensor]) -> None:
        """Add the ranks' parts, chunk by chunk: what far peers send for the next chunk arrives while this one is added,
        and little memory is needed.

        Args:
            lane: what to sum.
            parts: its ``full``, shape ``[world, n]``.
            near: the parts of near peers, shape ``[n]``, in their memory.
        """
        far = [peer for peer in self._peers if peer not in near]
        size = max(_CHUNK_BYTES // parts.element_size(), 1)
        chunks = [slice(first, min(first + size, parts.shape[1])) for first in range(0, parts.shape[1], size)]
        inboxes = [torch.empty(self.size, min(size, parts.shape[1]), dtype=parts.dtype) for _ in chunks[:2]]
        sends = [dist.isend(parts[peer, chunk], group=self._group, group_dst=peer) for chunk in chunks for peer in far]

        def receive(number: int) -> dict[int, tuple[dist.Work | None, torch.Tensor]]:
            chunk, inbox = chunks[number], inboxes[number % 2]
            arriving = {peer: inbox[peer, : chunk.stop - chunk.start] for peer in far}
            return {
                peer: (dist.irecv(part, group=self._group, group_src=peer), part) for peer, part in arriving.items()
            }

        coming = receive(0)
        for number, chunk in enumerate(chunks):
            here, coming = coming, receive(number + 1) if number + 1 < len(chunks) else {}
            own, scratch = lane.own[chunk], inboxes[number % 2][self.rank, : chunk.stop - chunk.start]
            total = None
            for rank in range(self.size):
                if rank in here:
                    work, part = here[rank]
                    _wait([work])
                else:
                    part = (near[rank] if rank in near else parts[rank])[chunk]
                straight = rank == self.size - 1 and not lane.accumulate and own.dtype == part.dtype
                total = part if total is None else self._add(total, part, out=own if straight else scratch)
            assert total is not None
            finish_sum(replace(lane, own=own), total)
        _wait(sends)

    def _add(self, total: torch.Tensor, part: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Return ``total + part``, in ``out`` or in memory of its own; 2-byte gradients are added in the reduction's
        dtype.
        """
        if part.element_size() < 4 and self._reduce_dtype is not None:
            return total.to(self._reduce_dtype).add_(part.to(self._reduce_dtype))
        return torch.add(total, part, out=out)

    def _swap_all(self, swap: Swap) -> None:
        sent = [peer for peer in self._peers if swap.sent[peer].numel()]
        received = [peer for peer in self._peers if swap.received[peer].numel()]
        works = [dist.irecv(swap.received[peer], group=self._group, group_src=peer) for peer in received]
        works += [dist.isend(swap.sent[peer], group=self._group, group_dst=peer) for peer in sent]
        swap.received[self.rank].copy_(swap.sent[self.rank])
        _wait(works)

    def _submit(self, job: Callable[[], None]) -> Ticket:
        if self._thread is None:
            with torch.no_grad():
                job()
            return Done()
        future: Future[None] = Future()
        self._jobs.put((job, future))
        return _Pending(future)


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    torch.set_num_threads(1)  # the computation keeps its cores
    torch.set_grad_enabled(False)  # this thread's own switch
    while (item := jobs.get()) is not None:
        job, future = item
        try:
            job()
            future.set_result(None)
        except BaseException as error:  # the caller's wait() raises it
            future.set_exception(error)
        del item, job, future  # they hold the exchange


def _wait(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()
