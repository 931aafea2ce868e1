"""One file without a name: arrays at offsets, read and written by a thread.

[Note: a file without a name] The file is made without a name, or loses it as soon as it is open. So nobody else sees
it, two jobs in one folder cannot meet, and the system frees its space when the process ends, even one that is killed.
Space for all arrays is allocated before training starts, so that a full disk is noticed then and not in a step.

[Note: one thread] Reads and writes run one after the other in the order in which they were asked for. So a read that
is asked for after a write of the same bytes finds what was written, and a buffer may be asked to be filled anew while
its content still waits to be written. The page cache of the system lies in between, which is right for any file system;
``O_DIRECT`` would want aligned buffers and is refused by some.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from lit_zero.core.errors import ConfigError, LitZeroError
from lit_zero.core.worker import Pending, Worker

_ALIGN = 4096  # bytes; arrays start on a page
_BLOCK = 512  # bytes in which the system counts what a file takes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_file(folder: Path) -> IO[bytes]:
    """Return a new file in ``folder`` that has no name.

    Raises:
        ConfigError: if none can be made there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(prefix="lit_zero-offload-", dir=folder, buffering=0)
    except OSError as error:
        raise ConfigError(
            f"offload.folder='{folder}' cannot be used: no file can be made there ({error.strerror}). Expected a "
            "folder in which this process may write."
        ) from error


class StateFile:
    """The file of one rank.

    Args:
        folder: where it is made.

    Attributes:
        size: bytes of arrays.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self.size = folder, 0
        file = open_file(folder)
        self._descriptor, self._worker = file.fileno(), Worker("lit_zero-offload")
        self._close = weakref.finalize(self, _end, self._worker, file)

    def close(self) -> None:
        """Wait for what is under way, and give the space back."""
        self._close()

    def promise(self, sizes: Sequence[int]) -> None:
        """Make the disk keep space free for arrays of ``sizes`` more bytes.

        Raises:
            ConfigError: if it has not as much.
        """
        self._allocate(self.size, sum(size + _ALIGN for size in sizes))

    def allocate(self, size: int) -> int:
        """Return the offset of ``size`` new bytes, all zero.

        Raises:
            ConfigError: if the disk is full.
        """
        offset = -(-self.size // _ALIGN) * _ALIGN
        self._allocate(offset, size)
        self.size = offset + size
        return offset

    def _allocate(self, offset: int, size: int) -> None:
        try:
            if size:
                _allocate(self._descriptor, offset, size)
        except OSError as error:
            if error.errno in _FULL:
                raise self._full(size) from error
            raise self._failed("allocating", size, error) from error

    def read(self, out: torch.Tensor, offset: int) -> Pending:
        """Begin to read into ``out`` (contiguous, host memory)."""
        return self._worker.submit(lambda: self._read(out, offset))

    def write(self, values: torch.Tensor, offset: int) -> Pending:
        """Begin to write ``values`` (contiguous, host memory), which must not change until that is over."""
        return self._worker.submit(lambda: self._write(values, offset))

    def _read(self, out: torch.Tensor, offset: int) -> None:
        view, done = _bytes(out), 0
        while done < len(view):
            try:
                got = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise self._failed("reading", len(view), error) from error
            if got == 0:
                raise self._failed("reading", len(view), OSError(errno.EIO, "the file ends too early"))
            done += got

    def _write(self, values: torch.Tensor, offset: int) -> None:
        view, done = _bytes(values), 0
        while done < len(view):
            try:
                done += os.pwritev(self._descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise self._failed("writing", len(view), error) from error

    def _full(self, size: int) -> ConfigError:
        return ConfigError(
            f"offload.folder='{self._folder}' has too little space: this rank needs {size:,} more bytes there, "
            f"{_free(self._descriptor):,} are free. Free some, choose another folder, or lower offload.ratio."
        )

    def _failed(self, doing: str, size: int, error: OSError) -> LitZeroError:
        return LitZeroError(
            f"offload.folder='{self._folder}': {doing} {size:,} bytes of model states failed ({error.strerror}). The "
            "weights of this run are lost on this rank; go on from the last checkpoint, which is unharmed, with "
            "another offload.folder."
        )


def _allocate(descriptor: int, offset: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, offset, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    # This file system cannot promise space: what is free now must do, and a write will tell if others take it.
    found = os.fstat(descriptor)
    if offset + size - found.st_blocks * _BLOCK > _free(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.truncate(descriptor, max(offset + size, found.st_size))


def _free(descriptor: int) -> int:
    """Return the bytes that are free where a file lies."""
    found = os.fstatvfs(descriptor)
    return found.f_bavail * found.f_frsize


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().view(torch.uint8).numpy().data


def _end(worker: Worker, file: IO[bytes]) -> None:
    worker.close()
    file.close()
