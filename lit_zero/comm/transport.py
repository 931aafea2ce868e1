"""Messages between the ranks of a pipeline: tensors of any shape, from one rank to another.

Nothing need be known of a message beforehand, and shapes may change from message to message. What is received lies in
memory of its own, never in that of the message before. Sends return at once. Receives are posted ahead, in the order in
which the other rank sends, so that a transfer runs beside the computation. There is no thread: gloo's own carry the
bytes, and Python's would take turns with the computation.

[Note: posting while waiting]
gloo tells the sender of every receive that is posted, which takes as long as sending a small message. So what is asked
for is posted when this rank waits anyway, mostly at the beginning of a step, as much as fits in ``_AHEAD_BYTES``.

[Note: frames]
A message is packed into one piece of memory: how long it is, a header that says what follows, and the tensors. It is
sent in a frame as long as the last message of the same key between the two ranks was, which both know when the receive
is posted; so a step like the one before takes one send a message. What does not fit follows by itself, with another
tag: further frames may be posted already. A header that is as it was the last time is neither made nor read again.

[Note: who has received what]
gloo does not say that a send is over unless it is waited for, and nobody wants to wait. So a header also says how many
messages its sender has received from the other rank: the memory of those can go. ``flush`` waits for the rest.

[Note: one group for each direction]
On GPUs the tensors do not go into the frame, but by NCCL. NCCL runs what shares a communicator one after the other, so
a receive would hold up the sends behind it. What goes from lower to higher ranks has a communicator, and what goes back
has another.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from lit_zero.comm.messages import START, Header, Headers, Message, Packed, within
from lit_zero.core.errors import LitZeroError

_LEAST_BYTES = 1 << 10  # of a frame
_AHEAD_BYTES = 16 << 20  # of frames that are posted at a time, from one rank
_AHEAD_LEAST = 2  # of them, however long
_SPARE_BYTES = 16 << 20  # of memory that is kept for messages to one rank
_END = timedelta(seconds=2)  # for a message to leave when this rank ends


@dataclass(frozen=True)
class _Place:
    """Stands where a tensor of the message belongs."""

    number: int


@dataclass
class _Flying:
    """A message that may not have left yet: its memory must stay."""

    works: list[dist.Work | None]
    packed: Packed
    held: list[torch.Tensor]


@dataclass
class _Posted:
    """A receive that was posted."""

    key: Hashable
    frame: torch.Tensor  # bytes
    work: dist.Work | None


class _Line:
    """What goes between this rank and another one."""

    def __init__(self) -> None:
        self.flying: deque[_Flying] = deque()
        self.wanted: deque[Hashable] = deque()  # keys of the messages to be posted after those that are
        self.posted: deque[_Posted] = deque()
        self.posted_bytes = 0
        self.spare: dict[Hashable, list[Packed]] = {}  # memory of messages that have left, by kind
        self.spare_bytes = 0
        self.left, self.came = 0, 0  # messages that have left for good, and that have come
        self.sent_frames: dict[Hashable, int] = {}  # bytes, by key
        self.came_frames: dict[Hashable, int] = {}
        self.sent_headers, self.came_headers = Headers(), Headers()

    @property
    def has_room(self) -> bool:
        """Whether the next message that is wanted may be posted."""
        length = self.came_frames.get(self.wanted[0], _LEAST_BYTES)
        return len(self.posted) < _AHEAD_LEAST or self.posted_bytes + length <= _AHEAD_BYTES

    def land(self, number: int, *patience: timedelta) -> None:
        """Let go of messages, up to the given number since the start; waits where they have not left."""
        while self.left < number and self.flying:
            for work in self.flying[0].works:
                if work is not None:
                    work.wait(*patience)
            self._spare(self.flying.popleft().packed)
            self.left += 1

    def packed(self, header: Header, length: int) -> Packed:
        """Return memory for a message that is going to be sent."""
        spare = self.spare.get((header.layout, length))
        if not spare:
            return Packed(header, length)
        self.spare_bytes -= length
        return spare.pop()

    def _spare(self, gone: Packed) -> None:
        length = gone.memory.numel()
        if self.spare_bytes + length > _SPARE_BYTES:  # mostly of messages that are not sent any more
            self.spare.clear()
            self.spare_bytes = 0
        if length <= _SPARE_BYTES:
            self.spare.setdefault(gone.kind, []).append(gone)
            self.spare_bytes += length


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

        self._frames = opened("gloo")
        # By direction: to higher positions, and to lower ones.
        self._groups = [opened("nccl"), opened("nccl")] if device.type == "cuda" else []
        self._lines: defaultdict[int, _Line] = defaultdict(_Line)  # by position
        self._sources: dict[Hashable, int] = {}  # of the messages that were posted
        self._come: dict[Hashable, Message] = {}  # and have come before those that were asked for
        weakref.finalize(self, _see_off, self._lines)

    def send(self, message: Message, to: int, counted: bool = True) -> None:
        """Start to send a message to the rank at position ``to``; its tensors may be written to afterwards, except on
        GPUs.

        Args:
            message: what is sent.
            to: position of the receiver.
            counted: among the bytes that were sent.
        """
        line, tensors = self._lines[to], [tensor.detach() for tensor in message.tensors]
        header = line.sent_headers.of(message)
        length, frame = header.length, line.sent_frames.get(message.key, _LEAST_BYTES)
        line.sent_frames[message.key] = max(length, _LEAST_BYTES)
        packed = line.packed(header, max(length, frame))
        start = START.pack(length, len(header.pickled), line.came) + header.pickled
        packed.content[: len(start)] = start
        for tensor, room in zip(tensors, packed.tensors, strict=True):
            if room is not None:
                room.copy_(tensor)
        memory = packed.memory
        parts = [memory] if frame == memory.numel() else [memory[:frame], memory[frame:]]
        # What dist.isend checks first takes as long as this.
        works: list[dist.Work | None] = [self._frames.send([part], to, tag) for tag, part in enumerate(parts)]
        held: list[torch.Tensor] = []
        for tensor, place in zip(tensors, header.places, strict=True):
            if place is None and tensor.numel():
                held.append(_bytes(tensor.resolve_conj().resolve_neg().contiguous()))  # NCCL knows few dtypes
                works.append(dist.isend(held[-1], group=self._groups[to < self.position], group_dst=to))
        if counted:
            self.sent_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        line.flying.append(_Flying(works, packed, held))

    def post(self, key: Hashable, source: int) -> None:
        """Get ready to receive the message ``key`` from the rank at position ``source``, after those posted before. As
        many as are wanted may be posted at once: no more than fit in some memory really are.
        """
        self._lines[source].wanted.append(key)
        self._sources[key] = source

    def forget(self) -> None:
        """Let go of what is wanted and not posted yet: the step that wanted it has failed."""
        for line in self._lines.values():
            for key in line.wanted:
                del self._sources[key]
            line.wanted.clear()

    def _post_wanted(self) -> None:
        for source, line in self._lines.items():
            while line.wanted and line.has_room:
                key = line.wanted.popleft()
                frame = torch.empty(line.came_frames.get(key, _LEAST_BYTES), dtype=torch.uint8, device="cpu")
                line.posted.append(_Posted(key, frame, self._frames.recv([frame], source, 0)))
                line.posted_bytes += frame.numel()

    def wait(self, key: Hashable) -> Message:
        """Return a message that was posted, once it is there.

        Raises:
            LitZeroError: if another one came: the two ranks do not run the same schedule.
        """
        source = self._sources.pop(key)
        line = self._lines[source]
        while key not in self._come:
            self._post_wanted()
            posted = line.posted.popleft()
            line.posted_bytes -= posted.frame.numel()
            message = self._receive(posted, source)
            if message.key != posted.key:
                raise LitZeroError(
                    f"Position {self.position} of the pipeline waited for {posted.key} and got {message.key}: the "
                    "ranks do not run the same schedule. Every rank must have the same settings and as many "
                    "micro-batches."
                )
            self._come[posted.key] = message
        return self._come.pop(key)

    def _receive(self, posted: _Posted, source: int) -> Message:
        # What comes is a normal tensor, also in an evaluation: modules may keep it.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
            line, packed = self._lines[source], posted.frame
            if posted.work is not None:
                posted.work.wait()
            content: Any = packed.numpy()
            length, size, received = START.unpack_from(content)
            if length > packed.numel():
                whole = torch.empty(length, dtype=torch.uint8, device="cpu")
                whole[: packed.numel()] = packed
                self._arrive(whole[packed.numel() :], self._frames, source, tag=1)
                packed = whole
            content = packed.numpy()
            header = line.came_headers.read(content[START.size : START.size + size].tobytes(), posted.key)
            line.came += 1
            line.came_frames[header.key] = max(length, _LEAST_BYTES)
            line.land(received)
            tensors = []
            for (shape, dtype, requires_grad, _), place in zip(header.described, header.places, strict=True):
                if place is not None:
                    tensor = within(content, place, shape, dtype)
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=self.device)
                    if tensor.numel():
                        self._arrive(_bytes(tensor), self._groups[source > self.position], source)
                tensors.append(tensor.requires_grad_(requires_grad))
            return Message(header.key, tensors, header.note)

    def _arrive(self, tensor: torch.Tensor, group: dist.ProcessGroup, source: int, tag: int = 0) -> None:
        work = dist.irecv(tensor, group=group, group_src=source, tag=tag)
        if work is not None:
            work.wait()

    def flush(self) -> None:
        """Return when everything sent has left."""
        for line in self._lines.values():
            line.land(line.left + len(line.flying))

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
        dist.all_gather_object(found, value, group=self._frames)
        return found


def _is_plain(value: Any) -> bool:
    """Return whether ``value`` is a tensor that is nothing but its elements in memory."""
    return type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized


def _see_off(lines: dict[int, _Line]) -> None:
    """Let the last messages leave before the process ends, unless nobody takes them."""
    with contextlib.suppress(RuntimeError):
        for line in lines.values():
            line.land(line.left + len(line.flying), _END)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
