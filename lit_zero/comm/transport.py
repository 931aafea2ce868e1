"""Messages between the ranks of a pipeline: tensors of any shape, from one rank to another.

A message is a header, which says what follows, and the tensors. So the receiver needs to know nothing beforehand, and
shapes may change from message to message. What is received lies in memory of its own, never in that of the message
before.

Sends return at once. Receives are posted ahead, in the order in which the other rank sends, and run on a thread for
each of the other ranks: the transfer runs beside the computation.

[Note: one group for each direction] NCCL runs what shares a communicator one after the other, so a receive that is
posted ahead would hold up the sends behind it. What goes from lower to higher ranks has a communicator, and what goes
back has another. Headers are sent by gloo in either case.
"""

from __future__ import annotations

import pickle
import queue
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from lit_zero.core.errors import LitZeroError

_HEADER_BYTES = 1 << 10  # a key and a few shapes fit; a random state that has moved takes a message of its own
_END_SECONDS = 2.0  # for a thread to finish what it does when nobody needs it any more


@dataclass
class Message:
    """What one rank sends to another.

    Attributes:
        key: what it is, equal on both ends.
        tensors: any number, of any shape and dtype.
        note: anything small that can be pickled.
    """

    key: Hashable
    tensors: list[torch.Tensor]
    note: Any = None


@dataclass(frozen=True)
class _Place:
    """Stands where a tensor of the message belongs."""

    number: int


@dataclass
class _Flying:
    works: list[dist.Work | None]
    held: list[torch.Tensor] = field(default_factory=list)  # they must live until the send is over


class Transport:
    """Sends and receives over the ranks of this rank's pipeline.

    Args:
        pipelines: the ranks of every pipeline, the same on every rank; all ranks must construct this together.
        device: where received tensors lie.
        timeout: how long a message may take.

    Attributes:
        position: of this rank in its pipeline.
        sent_bytes: of tensors, since the last reset.
    """

    def __init__(
        self, pipelines: Sequence[Sequence[int]], device: torch.device, timeout: timedelta | None = None
    ) -> None:
        rank = dist.get_rank()
        [self._ranks] = [list(ranks) for ranks in pipelines if rank in ranks]
        self.position, self.size = self._ranks.index(rank), len(self._ranks)
        self.device, self.sent_bytes = device, 0

        def opened(backend: str) -> dist.ProcessGroup:
            groups = [dist.new_group(list(ranks), backend=backend, timeout=timeout) for ranks in pipelines]
            [mine] = [group for group in groups if group != dist.GroupMember.NON_GROUP_MEMBER]
            return mine

        self._headers = opened("gloo")
        separate = device.type == "cuda"
        # By direction: to higher positions, and to lower ones.
        self._groups = [opened("nccl"), opened("nccl")] if separate else [self._headers, self._headers]
        self._leaving: queue.SimpleQueue[_Flying | Future[None] | None] | None = None
        self._coming: dict[Hashable, Future[Message]] = {}
        self._sources: dict[int, _Source] = {}
        self._shared = 0  # values that were shared so far

    def send(self, message: Message, to: int, counted: bool = True) -> None:
        """Start to send a message to the rank at position ``to``; its tensors must not be written to any more.

        Args:
            message: what is sent.
            to: position of the receiver.
            counted: among the bytes that were sent.
        """
        tensors = [tensor.detach().contiguous() for tensor in message.tensors]
        described = [
            (tuple(tensor.shape), tensor.dtype, like.requires_grad, tensor.device.type == "cpu")
            for tensor, like in zip(tensors, message.tensors, strict=True)
        ]
        content = torch.frombuffer(bytearray(pickle.dumps((message.key, described, message.note))), dtype=torch.uint8)
        header = torch.zeros(_HEADER_BYTES, dtype=torch.uint8)
        header[:8] = torch.tensor([content.numel()]).view(torch.uint8)
        first = min(content.numel(), _HEADER_BYTES - 8)
        header[8 : 8 + first] = content[:first]
        rest = content[first:]
        works = [dist.isend(part, group=self._headers, group_dst=to) for part in (header, rest) if part.numel()]
        by_device = self._groups[to < self.position]
        for tensor in tensors:
            group = self._headers if tensor.device.type == "cpu" else by_device
            works += [dist.isend(tensor, group=group, group_dst=to)] if tensor.numel() else []
        if counted:
            self.sent_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._leaving is None:
            self._leaving = queue.SimpleQueue()
            self._serve(partial(_see_off, self._leaving), self._leaving, "sent")
        self._leaving.put(_Flying(works, [header, rest, *tensors]))

    def post(self, key: Hashable, source: int) -> None:
        """Get ready to receive the message ``key`` from the rank at position ``source``, after those posted before."""
        future: Future[Message] = Future()
        self._coming[key] = future
        if source not in self._sources:
            line = _Source(source, self._headers, self._groups[source > self.position], self.device)
            self._serve(line.receive_all, line.posted, str(source))
            self._sources[source] = line
        self._sources[source].posted.put(future)

    def wait(self, key: Hashable) -> Message:
        """Return a message that was posted, once it is there.

        Raises:
            LitZeroError: if another one came: the two ranks do not run the same schedule.
        """
        message = self._coming.pop(key).result()
        if message.key != key:
            raise LitZeroError(
                f"Position {self.position} of the pipeline waited for {key} and got {message.key}: the ranks do not "
                "run the same schedule. Every rank must have the same settings and as many micro-batches."
            )
        return message

    def _serve(self, work: Callable[[], None], line: queue.SimpleQueue[Any], name: str) -> None:
        """Start a thread that works off ``line`` until this transport goes, at the latest with the process."""
        thread = threading.Thread(target=work, name=f"lit_zero-pipeline-{name}", daemon=True)
        thread.start()
        weakref.finalize(self, _end, line, thread)

    def flush(self) -> None:
        """Return when everything sent has left."""
        if self._leaving is not None:
            gone: Future[None] = Future()
            self._leaving.put(gone)
            gone.result()

    def share(self, value: Any, source: int) -> Any:
        """Return the ``value`` of the rank at position ``source`` on every rank of the pipeline.

        Args:
            value: anything that can be pickled; plain tensors in tuples, lists and dictionaries are not.
            source: whose it is.
        """
        if self.size == 1:
            return value
        self._shared += 1
        key = ("shared", self._shared)
        if self.position != source:
            self.post(key, source)
            message = self.wait(key)
            return tree_map(
                lambda leaf: message.tensors[leaf.number] if isinstance(leaf, _Place) else leaf, message.note
            )
        tensors: list[torch.Tensor] = []

        def put_aside(leaf: Any) -> Any:
            if not _is_plain(leaf):
                return leaf
            tensors.append(leaf.detach().clone())  # the user's code may write to its own
            return _Place(len(tensors) - 1)

        rest = tree_map(put_aside, value)
        for position in range(self.size):
            if position != source:
                self.send(Message(key, tensors, rest), position, counted=False)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` (any picklable object) of every rank of the pipeline, by position."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._headers)
        return found


def _is_plain(value: Any) -> bool:
    """Return whether ``value`` is a tensor that is nothing but its elements in memory."""
    return type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized


def _end(line: queue.SimpleQueue[Any], thread: threading.Thread) -> None:
    """End a thread. One that is still inside torch while Python shuts down would abort the process."""
    line.put(None)
    if thread is not threading.current_thread():
        thread.join(_END_SECONDS)


def _see_off(leaving: queue.SimpleQueue[_Flying | Future[None] | None]) -> None:
    """Hold what is sent until it has left. gloo never says so unless it is waited for, hence the thread."""
    failure: BaseException | None = None
    while (item := leaving.get()) is not None:
        if isinstance(item, _Flying):
            try:
                for work in item.works:
                    if work is not None:
                        work.wait()
            except BaseException as error:  # ``flush`` raises it
                failure = failure or error
        elif failure is not None:
            item.set_exception(failure)
        else:
            item.set_result(None)
        del item


@dataclass
class _Source:
    """Where messages come from, and what a thread needs to receive them. It does not hold the transport: one that
    nobody uses any more can go, and takes the thread with it.
    """

    position: int
    headers: dist.ProcessGroup
    tensors: dist.ProcessGroup
    device: torch.device
    posted: queue.SimpleQueue[Future[Message] | None] = field(default_factory=queue.SimpleQueue)

    def receive_all(self) -> None:
        torch.set_grad_enabled(False)  # this thread's own switch
        while (future := self.posted.get()) is not None:
            try:
                future.set_result(self._receive())
            except BaseException as error:  # the waiting rank raises it
                future.set_exception(error)
            del future

    def _receive(self) -> Message:
        header = torch.empty(_HEADER_BYTES, dtype=torch.uint8)
        self._arrive(header, self.headers)
        size = int(header[:8].view(torch.int64).item())
        content = header[8 : 8 + size]
        if size > _HEADER_BYTES - 8:
            rest = torch.empty(size - content.numel(), dtype=torch.uint8)
            self._arrive(rest, self.headers)
            content = torch.cat([content, rest])
        key, described, note = pickle.loads(content.numpy().tobytes())
        tensors = []
        for shape, dtype, requires_grad, on_cpu in described:
            tensor = torch.empty(shape, dtype=dtype, device="cpu" if on_cpu else self.device)
            if tensor.numel():
                self._arrive(tensor, self.headers if on_cpu else self.tensors)
            tensors.append(tensor.requires_grad_(requires_grad))
        return Message(key, tensors, note)

    def _arrive(self, tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        work = dist.irecv(tensor, group=group, group_src=self.position)
        if work is not None:
            work.wait()
