"""Memory that the ranks of one machine read from one another instead of sending it.

Every rank has an *arena*: anonymous files of the kernel (``memfd``) that are mapped into its memory. A rank of the same
machine opens them through ``/proc`` and maps them too; from then on it needs only a *place* (segment and offset) to
read what lies there. Who may read when is agreed by messages, see ``direct``.

The files have no name, belong to no file system, and are gone with the last process that maps them, however it ends.
Linux only; where a rank cannot open another's file (another machine, another container), the two exchange messages.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
import weakref
from dataclasses import dataclass

import torch

_SEGMENT_BYTES = 1 << 26  # of the first segment; untouched pages take no memory
_HEADER = struct.Struct("<16sQ")  # nonce, number of segments; entries follow
_ENTRY = struct.Struct("<QQ")  # file descriptor, bytes
_ALIGN = mmap.PAGESIZE  # so that pages of one allocation can be given back alone


@dataclass(frozen=True)
class Place:
    """Where a tensor begins in an arena.

    Attributes:
        segment: number of the segment.
        offset: bytes from its start.
    """

    segment: int
    offset: int


@dataclass(frozen=True)
class Address:
    """How another process finds an arena.

    Attributes:
        process: process id.
        descriptor: file descriptor of the header in that process.
        nonce: 16 random bytes that stand at the start of the header.
    """

    process: int
    descriptor: int
    nonce: bytes

    def encode(self) -> torch.Tensor:
        """Return it as int64, shape ``[4]``."""
        low, high = struct.unpack("<qq", self.nonce)
        return torch.tensor([self.process, self.descriptor, low, high], dtype=torch.int64)

    @classmethod
    def decode(cls, encoded: torch.Tensor) -> Address | None:
        """Return what :meth:`encode` gave, ``None`` for zeros (a rank without an arena)."""
        process, descriptor, low, high = encoded.tolist()
        return cls(process, descriptor, struct.pack("<qq", low, high)) if process else None


class _Segment:
    """A mapped file."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self.memory = mmap.mmap(descriptor, size)
        self.address = _tensor(self.memory, 0, 1).data_ptr()


def _tensor(memory: mmap.mmap, offset: int, size: int) -> torch.Tensor:
    """Return bytes of mapped memory as a tensor with a storage of its own, so that what is counted by storages is what
    is used.
    """
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)


class Arena:
    """This rank's memory that others may read.

    Args:
        room: bytes of the first segment; each one after it is as large as all before it, or larger.

    Raises:
        OSError: if the system has no such memory.
    """

    def __init__(self, room: int = _SEGMENT_BYTES) -> None:
        self._room = room
        self._descriptors: list[int] = []
        self._finalizer = weakref.finalize(self, _close, self._descriptors)
        header = self._new_file(_ALIGN)
        self._header = mmap.mmap(header, _ALIGN)
        self._segments: list[_Segment] = []
        self._used = 0  # bytes of the last segment
        self._free: dict[int, list[Place]] = {}  # by bytes
        self.address = Address(os.getpid(), header, secrets.token_bytes(16))
        self._publish()

    def allocate(self, size: int) -> torch.Tensor:
        """Return zeros of dtype uint8, shape ``[size]``.

        Raises:
            OSError: if there is no memory left.
        """
        padded = _padded(size)
        free = self._free.get(padded)
        place = free.pop() if free else self._extend(padded)
        return _tensor(self._segments[place.segment].memory, place.offset, size)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Return the pages of what :meth:`allocate` gave to the system. Nobody may read them any more."""
        place = self.locate(buffer)
        assert place is not None
        padded = _padded(buffer.numel())
        self._segments[place.segment].memory.madvise(mmap.MADV_REMOVE, place.offset, padded)
        self._free.setdefault(padded, []).append(place)

    def locate(self, tensor: torch.Tensor) -> Place | None:
        """Return where a tensor begins, ``None`` if it lies elsewhere."""
        address = tensor.data_ptr()
        for number, segment in enumerate(self._segments):
            if segment.address <= address < segment.address + segment.size:
                return Place(number, address - segment.address)
        return None

    def close(self) -> None:
        """Let nobody else map it; what is mapped stays until it is unused."""
        self._finalizer()

    def _extend(self, size: int) -> Place:
        if not self._segments or self._used + size > self._segments[-1].size:
            total = sum(segment.size for segment in self._segments)
            room = max(self._room, total, size)
            self._segments.append(_Segment(self._new_file(room), room))
            self._used = 0
            self._publish()
        place = Place(len(self._segments) - 1, self._used)
        self._used += size
        return place

    def _new_file(self, size: int) -> int:
        descriptor = os.memfd_create("lit_zero")
        self._descriptors.append(descriptor)
        os.ftruncate(descriptor, size)
        return descriptor

    def _publish(self) -> None:
        entries = zip(self._descriptors[1:], self._segments, strict=False)
        for number, (descriptor, segment) in enumerate(entries):
            _ENTRY.pack_into(self._header, _HEADER.size + number * _ENTRY.size, descriptor, segment.size)
        _HEADER.pack_into(self._header, 0, self.address.nonce, len(self._segments))


class Neighbour:
    """The arena of another rank of this machine.

    Args:
        address: where it is.

    Raises:
        OSError: if it cannot be opened, or is another process's than it says.
    """

    def __init__(self, address: Address) -> None:
        self._process = address.process
        self._header = self._map(address.descriptor, _ALIGN)
        self._segments: list[mmap.mmap] = []
        if _HEADER.unpack_from(self._header, 0)[0] != address.nonce:
            raise OSError("the process found is not the rank that was looked for")

    @property
    def segments(self) -> int:
        """How many of the arena's segments are mapped here."""
        return len(self._segments)

    def look(self, place: Place, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what lies at ``place``, shape ``[numel]``, without copying. It must not be written to."""
        while len(self._segments) <= place.segment:
            entry = _HEADER.size + len(self._segments) * _ENTRY.size
            descriptor, size = _ENTRY.unpack_from(self._header, entry)
            self._segments.append(self._map(descriptor, size))
        return _tensor(self._segments[place.segment], place.offset, numel * dtype.itemsize).view(dtype)

    def open(self, descriptor: int, flags: int) -> int:
        """Open another file of that process, and return this process's descriptor of it.

        Raises:
            OSError: if it cannot be opened.
        """
        return os.open(f"/proc/{self._process}/fd/{descriptor}", flags)

    def _map(self, descriptor: int, size: int) -> mmap.mmap:
        opened = self.open(descriptor, os.O_RDWR)
        try:
            return mmap.mmap(opened, size)
        except ValueError as error:  # a file of another process that is shorter
            raise OSError(str(error)) from None
        finally:
            os.close(opened)


def make_arena() -> Arena | None:
    """Return an arena, ``None`` where the system has none (it is not Linux, or forbids it)."""
    if not hasattr(os, "memfd_create") or not hasattr(mmap, "MADV_REMOVE"):
        return None
    try:
        arena = Arena()
        arena.give_back(arena.allocate(1))  # a limit may forbid the first segment, and a system to give back
        return arena
    except OSError:
        return None


def _padded(size: int) -> int:
    """Return the bytes that are set apart for ``size``: whole pages, and few different numbers, since what is given
    back serves an allocation of the same number again.
    """
    pages = max(-(-size // _ALIGN), 1)
    step = 1 << max(pages.bit_length() - 4, 0)  # at most an eighth is left over
    return -(-pages // step) * step * _ALIGN


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
