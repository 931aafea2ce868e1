"""What goes between two ranks of a pipeline: messages in order, as bytes.

[Note: who has received what] A sender is not told that a message has been taken unless it waits for that, and nobody
wants to wait. So a message also says how many its sender has received from the other rank: the memory of those can go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lit_zero.comm.messages import START, Header, Headers, Message, Packed

_LEAST_BYTES = 1 << 10  # of a frame
_AHEAD_BYTES = 16 << 20  # of frames that are posted at a time
_AHEAD_LEAST = 2  # of them, however long
_SPARE_BYTES = 16 << 20  # of memory that is kept for messages


@dataclass
class Flying:
    """A message that may not have been taken yet: its memory must stay.

    Attributes:
        packed: the message.
        works: what carries it.
        held: what else must stay.
    """

    packed: Packed
    works: list[dist.Work | None] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)


class Line:
    """What goes between this rank and another one.

    Attributes:
        flying: the messages that may not have been taken yet.
        wanted: keys of the messages that this rank expects next, in order.
        spare_bytes: memory that is kept for messages to come.
    """

    def __init__(self) -> None:
        self.flying: deque[Flying] = deque()
        self.wanted: deque[Hashable] = deque()
        self.spare_bytes = 0
        self._spare: dict[Hashable, list[Packed]] = {}  # memory of messages that were taken, by kind
        self._left, self._came = 0, 0  # messages that were taken by the other rank, and that have come
        self._sent_headers, self._came_headers = Headers(), Headers()

    def send(self, message: Message) -> tuple[Header, Flying]:
        """Start to send a message; its tensors on the host may be written to afterwards. Those elsewhere do not go."""
        header = self._sent_headers.of(message)
        packed = self._packed(header)
        start = START.pack(header.length, len(header.pickled), self._came) + header.pickled
        packed.content[: len(start)] = start
        for tensor, room in zip(message.tensors, packed.tensors, strict=True):
            if room is not None:
                room.copy_(tensor.detach())
        flying = Flying(packed)
        self.flying.append(flying)  # before it leaves: interrupted in between, one too many counts
        flying.works = self._leave(header, packed)
        return header, flying

    def receive(self) -> tuple[Hashable, Header, memoryview]:
        """Return the key of what was wanted first, and the message that has come: header and bytes."""
        key, content = self._fetch()
        _, size, received = START.unpack_from(content)
        header = self._came_headers.read(content[START.size : START.size + size].tobytes(), key)
        self._came += 1
        self._has_come(header)
        self.land(received)
        return key, header, content

    def post(self) -> None:
        """Get ready to receive what is wanted, as far as there is room: this rank waits anyway."""

    def land(self, number: int, patience: timedelta | None = None) -> None:
        """Let go of messages, up to the given number since the start; waits where they have not left."""
        while self._left < number and self.flying:
            for work in self.flying[0].works:
                if work is not None:
                    work.wait() if patience is None else work.wait(patience)
            self._left += 1  # first: interrupted in between, one too many counts
            self._keep(self.flying.popleft().packed)

    def flush(self, patience: timedelta | None = None) -> None:
        """Return when everything that was sent arrives though this process ends."""

    def _packed(self, header: Header) -> Packed:
        """Return memory for a message that is going to be sent."""
        length = self._length(header)
        spare = self._spare.get((header.layout, length))
        if spare:
            self.spare_bytes -= length
            return spare.pop()
        with torch.inference_mode(False):  # the memory serves other messages too
            return Packed(header, self._allocate(length))

    def _keep(self, packed: Packed) -> None:
        length = packed.memory.numel()
        if length > _SPARE_BYTES:
            self._give_back(packed)
            return
        if self.spare_bytes + length > _SPARE_BYTES:  # mostly of messages that are not sent any more
            old, self._spare, self.spare_bytes = self._spare, {}, 0
            for each in old.values():
                for gone in each:
                    self._give_back(gone)
        self._spare.setdefault(packed.kind, []).append(packed)
        self.spare_bytes += length

    def _length(self, header: Header) -> int:
        """Return how much memory a message takes, in bytes."""
        return header.length

    def _allocate(self, length: int) -> torch.Tensor:
        return torch.empty(length, dtype=torch.uint8, device="cpu")

    def _give_back(self, packed: Packed) -> None:
        """Let memory go."""

    def _leave(self, header: Header, packed: Packed) -> list[dist.Work | None]:
        """Send a message that lies in memory."""
        raise NotImplementedError

    def _fetch(self) -> tuple[Hashable, memoryview]:
        """Return the key that was wanted first, and the bytes that have come."""
        raise NotImplementedError

    def _has_come(self, header: Header) -> None:
        """Learn from a message."""


@dataclass
class _Posted:
    """A receive that was posted."""

    key: Hashable
    frame: torch.Tensor  # bytes
    work: dist.Work | None


class FarLine(Line):
    """Carries messages over gloo.

    [Note: posting while waiting] gloo tells the sender of every receive that is posted, which takes as long as sending
    a small message. So what is wanted is posted when this rank waits anyway, mostly at the beginning of a step, as much
    as fits in ``_AHEAD_BYTES``.

    [Note: frames] A message is sent in a frame as long as the last message of the same key was, which both ranks know
    when the receive is posted; so a step like the one before takes one send a message. What does not fit follows by
    itself, with another tag: further frames may be posted already.

    Args:
        group: of gloo.
        position: of the other rank in it.
    """

    def __init__(self, group: dist.ProcessGroup, position: int) -> None:
        super().__init__()
        self._group, self._position = group, position
        self.posted: deque[_Posted] = deque()
        self._posted_bytes = 0
        self._sent_frames: dict[Hashable, int] = {}  # bytes, by key
        self._came_frames: dict[Hashable, int] = {}

    def flush(self, patience: timedelta | None = None) -> None:
        self.land(self._left + len(self.flying), patience)

    def post(self) -> None:
        while self.wanted and self._has_room:
            key = self.wanted.popleft()
            frame = torch.empty(self._came_frames.get(key, _LEAST_BYTES), dtype=torch.uint8, device="cpu")
            self.posted.append(_Posted(key, frame, self._group.recv([frame], self._position, 0)))
            self._posted_bytes += frame.numel()

    @property
    def _has_room(self) -> bool:
        length = self._came_frames.get(self.wanted[0], _LEAST_BYTES)
        return len(self.posted) < _AHEAD_LEAST or self._posted_bytes + length <= _AHEAD_BYTES

    def _length(self, header: Header) -> int:
        return max(header.length, self._sent_frames.get(header.key, _LEAST_BYTES))

    def _leave(self, header: Header, packed: Packed) -> list[dist.Work | None]:
        frame = self._sent_frames.get(header.key, _LEAST_BYTES)
        self._sent_frames[header.key] = max(header.length, _LEAST_BYTES)
        memory = packed.memory
        parts = [memory] if frame == memory.numel() else [memory[:frame], memory[frame:]]
        # What dist.isend checks first takes as long as this.
        return [self._group.send([part], self._position, tag) for tag, part in enumerate(parts)]

    def _fetch(self) -> tuple[Hashable, memoryview]:
        posted = self.posted.popleft()
        packed = posted.frame
        self._posted_bytes -= packed.numel()
        if posted.work is not None:
            posted.work.wait()
        content: Any = packed.numpy()
        length, *_ = START.unpack_from(content)
        if length > packed.numel():
            whole = torch.empty(length, dtype=torch.uint8, device="cpu")
            whole[: packed.numel()] = packed
            work = self._group.recv([whole[packed.numel() :]], self._position, 1)
            if work is not None:
                work.wait()
            content = whole.numpy()
        return posted.key, memoryview(content)

    def _has_come(self, header: Header) -> None:
        self._came_frames[header.key] = max(header.length, _LEAST_BYTES)
