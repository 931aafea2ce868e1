"""A message in memory: how long it is, a header that says what follows, and the tensors."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Of a message: its length, that of its header, in bytes, and how many messages its sender has received.
START = struct.Struct("<qqq")
_ALIGN_BYTES = 64


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


@dataclass
class Header:
    """What a message says of itself.

    Attributes:
        key: of the message.
        note: of the message.
        described: shape, dtype, whether it requires a gradient and whether it is on the host, for every tensor.
        pickled: all that.
        places: where the tensors begin in the message, ``None`` for those that go by themselves.
        length: of the message, in bytes.
        layout: equal for messages that lie in memory alike.
    """

    key: Hashable
    note: Any
    described: list[tuple[Any, ...]]
    pickled: bytes

    def __post_init__(self) -> None:
        self.places, self.length = _places(len(self.pickled), self.described)
        self.layout = len(self.pickled), *self.described


class Packed:
    """Memory of a message that is sent.

    Args:
        header: of the message.
        memory: the bytes; the message may be shorter.

    Attributes:
        memory: the same.
        kind: equal for memory in which the same messages fit.
        content: the same, to write to.
        tensors: the places of the message's tensors, ``None`` for those that go by themselves or are empty.
    """

    def __init__(self, header: Header, memory: torch.Tensor) -> None:
        self.kind, self.memory = (header.layout, memory.numel()), memory
        content: Any = memory.numpy()
        self.content = memoryview(content)
        self.tensors = [
            None if place is None or not math.prod(shape) else within(content, place, shape, dtype)
            for (shape, dtype, *_), place in zip(header.described, header.places, strict=True)
        ]


class Headers:
    """The headers of messages in one direction, by key: one that is as it was the last time is neither made nor read
    again.
    """

    def __init__(self) -> None:
        self._last: dict[Hashable, Header] = {}

    def of(self, message: Message) -> Header:
        """Return the header of a message that is about to be sent."""
        described = [(t.shape, t.dtype, t.requires_grad, t.is_cpu) for t in message.tensors]
        last = self._last.get(message.key)
        if last is not None and _lasts(message.note) and last.described == described and last.note == message.note:
            return last
        said = message.key, message.note, described
        return self._keep(Header(*said, pickle.dumps(said)))

    def read(self, pickled: bytes, key: Hashable) -> Header:
        """Return the header of a message that has come when ``key`` was expected."""
        last = self._last.get(key)
        if last is not None and last.pickled == pickled:
            return last
        said, note, described = pickle.loads(pickled)
        return self._keep(Header(said, note, described, pickled))

    def _keep(self, header: Header) -> Header:
        if _lasts(header.note):
            self._last[header.key] = header
        return header


def _places(header: int, described: Sequence[tuple[Any, ...]]) -> tuple[list[int | None], int]:
    """Return where the tensors of a message begin in it, ``None`` for those that go by themselves, and its length.

    Args:
        header: its bytes.
        described: shape, dtype, whether it requires a gradient and whether it is on the host, for every tensor.
    """
    places: list[int | None] = []
    end = START.size + header
    for shape, dtype, _, on_host in described:
        if on_host:
            end = -(-end // _ALIGN_BYTES) * _ALIGN_BYTES
        places.append(end if on_host else None)
        end += math.prod(shape) * dtype.itemsize if on_host else 0
    return places, end


def _lasts(note: Any) -> bool:
    """Return whether other messages may have a note too: nobody can write to it, and it is compared in no time."""
    return note is None or (type(note) is tuple and all(type(each) is bool for each in note))


def within(content: Any, place: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor that begins at byte ``place``; its versions are counted apart from those of others there."""
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(content, dtype=dtype, count=count, offset=place).view(shape)
