"""Shards in a file: read and written in portions, two of which are in memory at a time.

A step on a file, in phases, for portion ``i`` of all arrays of a segment:

1. The thread reads portion ``i + 1`` into the other buffer, which it has written to the file before.
2. The caller steps on portion ``i``.
3. The thread is given portion ``i`` to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from lit_zero.core.forms import Origin
from lit_zero.core.keeping import Content, Kept
from lit_zero.core.ticket import Ticket
from lit_zero.core.worker import Pending
from lit_zero.offload.file import StateFile
from lit_zero.offload.host import HostKeeper, host_memory

_ROUND = 1024  # elements; portions begin where a vectorised kernel would begin a row of its own


class Filed(Kept):
    """A flat array in a file.

    Args:
        file: the file.
        offset: where it begins, in bytes.
        numel: its elements.
        dtype: their dtype.
        chunk: most bytes of it that are in memory at a time where it is written.
    """

    live = False

    def __init__(self, file: StateFile, offset: int, numel: int, dtype: torch.dtype, chunk: int) -> None:
        self._file, self._offset, self._numel, self._dtype, self._chunk = file, offset, numel, dtype, chunk

    @property
    def numel(self) -> int:
        return self._numel

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def part(self, first: int, last: int) -> Filed:
        offset = self._offset + first * self._dtype.itemsize
        return Filed(self._file, offset, last - first, self._dtype, self._chunk)

    def read(self) -> torch.Tensor:
        out = torch.empty(self._numel, dtype=self._dtype, device="cpu")
        self.begin_read(out).wait()
        return out

    def write(self, first: int, values: torch.Tensor) -> None:
        flat = values.detach().reshape(-1)
        step = max(self._chunk // self._dtype.itemsize, 1)
        for begin in range(0, flat.numel(), step):
            part = flat[begin : begin + step].to("cpu", self._dtype).contiguous()
            self.part(first + begin, first + begin + part.numel()).begin_write(part).wait()

    def fetch(self, out: torch.Tensor) -> Ticket:
        if out.device.type == "cpu" and out.dtype == self._dtype:
            return self.begin_read(out)
        staged = host_memory(self._numel, self._dtype, out.device)
        return _Staged(self.begin_read(staged), staged, out)

    def stand_in(self) -> torch.Tensor:
        return torch.zeros((), dtype=self._dtype, device="cpu").expand(self._numel)

    def tensors(self) -> list[torch.Tensor]:
        return []

    def begin_read(self, out: torch.Tensor) -> Pending:
        """Begin to read all of it into ``out``, in host memory and of its dtype."""
        return self._file.read(out, self._offset)

    def begin_write(self, values: torch.Tensor) -> Pending:
        """Begin to write all of it; ``values`` must not change until that is over."""
        return self._file.write(values, self._offset)


class _Staged:
    """A read into host memory and the copy from there."""

    def __init__(self, reading: Pending, staged: torch.Tensor, out: torch.Tensor) -> None:
        self._reading, self._staged, self._out = reading, staged, out

    def wait(self) -> None:
        self._reading.wait()
        with torch.no_grad():
            self._out.copy_(self._staged, non_blocking=True)


class DiskKeeper(HostKeeper):
    """The file of a rank. Gradients wait in host memory.

    Args:
        file: the file.
        chunk: bytes of one portion of all arrays together.
        params: sharded parameters leave the device too.
        device: what they leave.
    """

    place = "file"

    def __init__(self, file: StateFile, chunk: int, params: bool, device: torch.device) -> None:
        super().__init__(params, device)
        self._file, self._chunk = file, chunk

    def keep(self, numel: int, dtype: torch.dtype, content: Content = Content.WEIGHTS) -> Filed:
        return Filed(self._file, self._file.allocate(numel * dtype.itemsize), numel, dtype, self._chunk)

    def walk(
        self, arrays: Mapping[str, Kept], to_come: int, origin: Origin
    ) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        filed = {key: array for key, array in arrays.items() if isinstance(array, Filed)}
        numel = next(iter(filed.values())).numel
        width = sum(array.dtype.itemsize for array in filed.values()) + to_come
        length = min(max(self._chunk // width // _ROUND * _ROUND, _ROUND), numel)
        buffers = [
            {key: torch.empty(length, dtype=array.dtype, device="cpu") for key, array in filed.items()}
            for _ in range(min(2, -(-numel // length)))
        ]
        portions = [(first, min(first + length, numel)) for first in range(0, numel, length)]

        def views(number: int) -> dict[str, torch.Tensor]:
            first, last = portions[number]
            return {key: buffer[: last - first] for key, buffer in buffers[number % 2].items()}

        def parts(number: int) -> dict[str, Filed]:
            return {key: array.part(*portions[number]) for key, array in filed.items()}

        def read(number: int) -> list[Pending]:
            here = views(number)
            return [part.begin_read(here[key]) for key, part in parts(number).items()]

        reading, writing = read(0), list[Pending]()
        for number, (first, last) in enumerate(portions):
            for ticket in reading:
                ticket.wait()
            reading = read(number + 1) if number + 1 < len(portions) else []  # behind the writes of that buffer
            here = views(number)
            yield first, last, here
            for ticket in writing:
                ticket.wait()  # what has failed is told now
            writing = [part.begin_write(here[key]) for key, part in parts(number).items()]
        for ticket in writing:
            ticket.wait()
