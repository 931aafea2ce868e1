"""Messages between the ranks of a pipeline: tensors of any shape, from one rank to another.

Nothing need be known of a message beforehand, and shapes may change from message to message. What is received lies in
memory of its own, never in that of the message before. Nobody waits for what it sends to be taken, and receives are
asked for ahead, in the order in which the other rank sends.

A message is packed into one piece of memory: how long it is, a header that says what follows, and the tensors. A header
that is as it was the last time is neither made nor read again. What carries the pieces is a line: between ranks of one
machine the memory that both see (``near``), else gloo (``lines``). There is no thread of ours: it would take turns with
the computation.

[Note: one group for each direction]
On GPUs the tensors do not go into the piece, but by NCCL, and all pieces by gloo. NCCL runs what shares a communicator
one after the other, so a receive would hold up the sends behind it. What goes from lower to higher ranks has a
communicator, and what goes back has another.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.utils._pytree import tree_map

from lit_zero.comm.lines import FarLine, Line
from lit_zero.comm.messages import Message, within
from lit_zero.comm.near import near_lines
from lit_zero.core.errors import LitZeroError

_END = timedelta(seconds=2)  # for a message to leave when this rank ends


@dataclass(frozen=True)
class _Place:
    """Stands where a tensor of the message belongs."""

    number: int


class Transport:
    """Sends and receives over the ranks of this rank's pipeline.

    Args:
        pipelines: the ranks of every pipeline, the same on every rank; all ranks must construct this together.
        device: where received tensors lie.
        timeout: how long a message may take.
        shared_memory: on CPUs, messages to ranks of the same machine go through memory; else all go over gloo.

    Attributes:
        position: of this rank in its pipeline.
        sent_bytes: of tensors, since the last reset.
    """

    def __init__(
        self,
        pipelines: Sequence[Sequence[int]],
        device: torch.device,
        timeout: timedelta | None = None,
        shared_memory: bool = True,
    ) -> None:
        rank = dist.get_rank()
        [self._ranks] = [list(ranks) for ranks in pipelines if rank in ranks]
        self.position, self.size = self._ranks.index(rank), len(self._ranks)
        self.device, self.sent_bytes = device, 0

        def opened(backend: str) -> dist.ProcessGroup:
            groups = [dist.new_group(list(ranks), backend=backend, timeout=timeout) for ranks in pipelines]
            [mine] = [group for group in groups if group != dist.GroupMember.NON_GROUP_MEMBER]
            return mine

        self._host = opened("gloo")
        # By direction: to higher positions, and to lower ones.
        self._groups = [opened("nccl"), opened("nccl")] if device.type == "cuda" else []
        others = [position for position in range(self.size) if position != self.position]
        self._lines: dict[int, Line] = {other: FarLine(self._host, other) for other in others}
        if shared_memory and device.type == "cpu":
            self._lines.update(near_lines(self._host, timeout or default_pg_timeout))
        self._sources: dict[Hashable, int] = {}  # of the messages that were posted
        self._come: dict[Hashable, Message] = {}  # and have come before those that were asked for
        weakref.finalize(self, _see_off, list(self._lines.values()))

    def send(self, message: Message, to: int, counted: bool = True) -> None:
        """Start to send a message to the rank at position ``to``; its tensors may be written to afterwards, except on
        GPUs.

        Args:
            message: what is sent.
            to: position of the receiver.
            counted: among the bytes that were sent.
        """
        header, flying = self._lines[to].send(message)
        for tensor, place in zip(message.tensors, header.places, strict=True):
            if place is None and tensor.numel():
                # NCCL knows few dtypes.
                flying.held.append(_bytes(tensor.detach().resolve_conj().resolve_neg().contiguous()))
                works = dist.isend(flying.held[-1], group=self._groups[to < self.position], group_dst=to)
                flying.works.append(works)
        if counted:
            self.sent_bytes += sum(tensor.numel() * tensor.element_size() for tensor in message.tensors)

    def post(self, key: Hashable, source: int) -> None:
        """Get ready to receive the message ``key`` from the rank at position ``source``, after those posted before. As
        many as are wanted may be posted at once: what that takes is bounded.
        """
        self._lines[source].wanted.append(key)
        self._sources[key] = source

    def forget(self) -> None:
        """Let go of what is wanted and not posted yet: the step that wanted it has failed."""
        for line in self._lines.values():
            for key in line.wanted:
                self._sources.pop(key, None)  # without the one that was waited for in vain
            line.wanted.clear()

    def wait(self, key: Hashable) -> Message:
        """Return a message that was posted, once it is there.

        Raises:
            LitZeroError: if another one came: the two ranks do not run the same schedule.
        """
        source = self._sources.pop(key)
        while key not in self._come:
            for line in self._lines.values():
                line.post()
            wanted, message = self._receive(source)
            if message.key != wanted:
                raise LitZeroError(
                    f"Position {self.position} of the pipeline waited for {wanted} and got {message.key}: the "
                    "ranks do not run the same schedule. Every rank must have the same settings and as many "
                    "micro-batches."
                )
            self._come[wanted] = message
        return self._come.pop(key)

    def _receive(self, source: int) -> tuple[Hashable, Message]:
        # What comes is a normal tensor, also in an evaluation: modules may keep it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            wanted, header, content = self._lines[source].receive()
            tensors = []
            for (shape, dtype, requires_grad, _), place in zip(header.described, header.places, strict=True):
                if place is not None:
                    tensor = within(content, place, shape, dtype)
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=self.device)
                    if tensor.numel():
                        self._arrive(tensor, source)
                tensors.append(tensor.requires_grad_(requires_grad))
            return wanted, Message(header.key, tensors, header.note)

    def _arrive(self, tensor: torch.Tensor, source: int) -> None:
        work = dist.irecv(_bytes(tensor), group=self._groups[source > self.position], group_src=source)
        if work is not None:
            work.wait()

    def flush(self) -> None:
        """Return when everything that was sent arrives though this process ends."""
        for line in self._lines.values():
            line.flush()

    def share(self, value: Any, source: int, key: str = "shared") -> Any:
        """Return the ``value`` of the rank at position ``source`` on every rank of the pipeline, in memory of its own.
        Its receive may have been posted before, as ``key``.

        Args:
            value: anything that can be pickled; plain tensors in tuples, lists and dictionaries are not.
            source: whose it is.
            key: what it is; values of one key should be of like size.
        """
        if self.size == 1:
            return value
        if self.position != source:
            if key not in self._sources:
                self.post(key, source)
            message = self.wait(key)
            # Users keep these: one must not keep the whole message, and two must not lie in the same storage.
            with torch.inference_mode(False):
                own = [t.clone() if t.device.type == "cpu" else t for t in message.tensors]
            return tree_map(lambda leaf: own[leaf.number] if isinstance(leaf, _Place) else leaf, message.note)
        tensors: list[torch.Tensor] = []

        def put_aside(leaf: Any) -> Any:
            if not _is_plain(leaf):
                return leaf
            # The user's code may write to its own.
            tensors.append(leaf.detach() if leaf.device.type == "cpu" else leaf.detach().clone())
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
        dist.all_gather_object(found, value, group=self._host)
        return found


def _is_plain(value: Any) -> bool:
    """Return whether ``value`` is a tensor that is nothing but its elements in memory."""
    return type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized


def _see_off(lines: Sequence[Line]) -> None:
    """Let the last messages leave before the process ends, unless nobody takes them."""
    with contextlib.suppress(RuntimeError):
        for line in lines:
            line.flush(_END)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
