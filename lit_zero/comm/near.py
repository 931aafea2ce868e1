"""Messages between ranks of one machine: their bytes lie in memory that both see, and a pipe says where.

A message costs its sender one copy and one short write, and its receiver one short read and one copy. Nobody is woken
but a rank that waits: gloo's thread would take its core from the receiver's computation, which costs both of them more
than the copies. A pipe is in order, can be waited for with a timeout, says when the other end has gone, and what has
been written to it makes what was written to memory before visible.

[Note: memory of messages] It is used again when the other rank says that it has taken them: with its next message, or
in a record of its own once it has taken many. What a process has sent can be taken when it has ended, because the other
rank has mapped the memory. Only a segment that is new has not been mapped yet: it is told at once that the first
message there was taken, and ``flush`` waits for that.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import weakref
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lit_zero.comm.lines import Line
from lit_zero.comm.messages import Header, Packed
from lit_zero.comm.shared import Address, Arena, Neighbour, Place, make_arena
from lit_zero.core.errors import LostRankError

_RECORD = struct.Struct("<qqq")  # segment, offset, bytes of a message; or _TAKEN, messages that have come, 0
_TAKEN = -1
_TAKEN_AFTER = 16  # messages that have come since the other rank was told
_TAKEN_AFTER_BYTES = 1 << 20  # of such messages
_READ_BYTES = 128 * _RECORD.size  # of records at a time; a pipe holds whole ones
_LONGEST = (1 << 31) - 1  # milliseconds that poll can wait


@dataclass
class _Ends:
    """Of the pipes to and from another rank: descriptors of where this rank reads and writes."""

    read: int
    write: int


class NearLine(Line):
    """Carries messages through memory.

    Args:
        arena: this rank's memory, of which the other rank has mapped the first segment.
        neighbour: the other rank's.
        ends: of the pipes.
        name: of the other rank, in messages of errors.
        timeout: how long a message may take.
    """

    def __init__(self, arena: Arena, neighbour: Neighbour, ends: _Ends, name: str, timeout: timedelta) -> None:
        super().__init__()
        self._arena, self._neighbour, self._ends, self._name, self._timeout = arena, neighbour, ends, name, timeout
        self._records: deque[tuple[int, int, int]] = deque()  # that were read, of messages that were not
        os.set_blocking(ends.read, False)
        os.set_blocking(ends.write, False)
        self._told = 0  # messages that have come, as the other rank knows
        self._untold_bytes = 0  # of those that have come since
        self._mapped = 0  # this rank's last segment that the other one has mapped
        weakref.finalize(self, _close, ends)

    def flush(self, patience: timedelta | None = None) -> None:
        if self._flying_bytes >= _TAKEN_AFTER_BYTES:
            with contextlib.suppress(LostRankError):  # it may end when it has taken everything
                self._read()
        while any(self._place(flying.packed).segment > self._mapped for flying in self.flying):
            if not self._read():
                self._sleep("took no message", patience)

    def _allocate(self, length: int) -> torch.Tensor:
        return self._arena.allocate(length)

    def _give_back(self, packed: Packed) -> None:
        self._arena.give_back(packed.memory)

    def _keep(self, packed: Packed) -> None:
        self._mapped = max(self._mapped, self._place(packed).segment)
        super()._keep(packed)

    @property
    def _flying_bytes(self) -> int:
        return sum(flying.packed.memory.numel() for flying in self.flying)

    def _place(self, packed: Packed) -> Place:
        place = self._arena.locate(packed.memory)
        assert place is not None
        return place

    def _leave(self, header: Header, packed: Packed) -> list[dist.Work | None]:
        if len(self.flying) > _TAKEN_AFTER or self._flying_bytes >= _TAKEN_AFTER_BYTES:
            self._read()
        place = self._place(packed)
        self._write(place.segment, place.offset, header.length)
        self._told, self._untold_bytes = self._came, 0
        return []

    def _fetch(self) -> tuple[Hashable, memoryview]:
        while not self._records:
            if not self._read():
                self._sleep("sent no message")
        segment, offset, length = self._records[0]
        new = segment >= self._neighbour.segments
        try:
            content: Any = self._neighbour.look(Place(segment, offset), length, torch.uint8).clone().numpy()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended before its memory was mapped
            raise self._lost() from None
        self._records.popleft()
        self._untold_bytes += _TAKEN_AFTER_BYTES if new else length
        return self.wanted.popleft(), memoryview(content)

    def _has_come(self, header: Header) -> None:
        if self._came - self._told >= _TAKEN_AFTER or self._untold_bytes >= _TAKEN_AFTER_BYTES:
            # Otherwise it has ended, or is told with the next message.
            with contextlib.suppress(BrokenPipeError, BlockingIOError):
                os.write(self._ends.write, _RECORD.pack(_TAKEN, self._came, 0))
                self._told, self._untold_bytes = self._came, 0

    # ---- the pipes

    def _write(self, *record: int) -> None:
        while True:
            try:
                os.write(self._ends.write, _RECORD.pack(*record))
                return
            except BlockingIOError:
                # Thousands of messages are not taken. Two ranks do not wait here for each other: both have read first.
                self._sleep("took no message", writes=True)
            except BrokenPipeError:
                raise self._lost() from None

    def _read(self) -> bool:
        """Read what is there; return whether something was."""
        try:
            found = os.read(self._ends.read, _READ_BYTES)
        except BlockingIOError:
            return False
        if not found:
            raise self._lost()
        for record in _RECORD.iter_unpack(found):
            if record[0] == _TAKEN:
                self.land(record[1])
            else:
                self._records.append(record)
        return True

    def _sleep(self, fault: str, patience: timedelta | None = None, writes: bool = False) -> None:
        """Return when there is something to read, or room to write.

        Args:
            fault: what the other rank has not done if that does not come.
            patience: how long to wait, by default the timeout.
            writes: wait for room to write.
        """
        patience = self._timeout if patience is None else patience
        poll = select.poll()
        poll.register(*((self._ends.write, select.POLLOUT) if writes else (self._ends.read, select.POLLIN)))
        if not poll.poll(min(patience / timedelta(milliseconds=1), _LONGEST)):
            raise LostRankError(
                f"Timed out: {self._name} {fault} for {patience.total_seconds():g} seconds. It waits for something "
                "else, or works for longer than that."
            )

    def _lost(self) -> LostRankError:
        return LostRankError(f"Connection closed: {self._name} has ended. What it has said last tells why.")


def near_lines(group: dist.ProcessGroup, timeout: timedelta) -> dict[int, NearLine]:
    """Return a line to every rank of a gloo group that runs on the same machine, by position. All ranks of the group
    together.

    Args:
        group: the ranks.
        timeout: how long a message may take.
    """
    size, position = dist.get_world_size(group), dist.get_rank(group)
    others = [other for other in range(size) if other != position]
    arena = make_arena()
    pipes = {other: os.pipe() for other in others} if arena is not None else {}
    said = None if arena is None else (arena.address, {other: write for other, (_, write) in pipes.items()})
    found: dict[int, tuple[Neighbour, int]] = {}
    for other, theirs in enumerate(_everyones(said, group)):
        if other != position and arena is not None and theirs is not None:
            address, writes = theirs
            with contextlib.suppress(OSError):
                found[other] = _open(address, writes[position])
    mutual = [position in opened for opened in _everyones(set(found), group)]
    lines = {}
    for other, (read, write) in pipes.items():
        os.close(write)  # the other rank has it open, and is now the only one: its end is seen
        if mutual[other] and other in found:
            assert arena is not None
            neighbour, theirs = found[other]
            name = f"position {other} of the pipeline (rank {dist.get_global_rank(group, other)})"
            lines[other] = NearLine(arena, neighbour, _Ends(read, theirs), name, timeout)
        else:
            os.close(read)
            if other in found:
                os.close(found[other][1])
    return lines


def _open(address: Address, write: int) -> tuple[Neighbour, int]:
    neighbour = Neighbour(address)
    neighbour.look(Place(0, 0), 1, torch.uint8)  # maps the first segment
    return neighbour, neighbour.open(write, os.O_WRONLY)


def _everyones(value: Any, group: dist.ProcessGroup) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _close(ends: _Ends) -> None:
    os.close(ends.read)
    os.close(ends.write)
