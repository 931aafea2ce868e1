"""Files and folders that appear whole or not at all.

A save writes under a hidden temporary name beside the target, flushes everything to the disk, and then puts it in
place in one step, so the target is at every moment the complete old checkpoint or the complete new one. Killed at any
point, a save leaves at most a hidden sibling, which the next save of the same name removes. Two saves of one name
must not run at the same time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from lit_zero.core.errors import CheckpointError

HEADER = "lit_zero.json"  # the file that tells a sharded checkpoint from any other folder
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h> and <linux/fs.h>


def save_file_atomic(obj: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save(obj, path)`` that keeps the previous file until the new one is complete.

    Args:
        obj: what ``torch.save`` takes.
        path: the file to write; its folder is made if need be.

    Raises:
        CheckpointError: if ``path`` is a folder other than a sharded checkpoint.
        Exception: whatever the writing raised; the previous file is then untouched and nothing temporary remains.
    """
    write_file_atomic(path, lambda file: torch.save(obj, file))


def write_file_atomic(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with a new file open for writing, and let it take the place of ``path`` once it is complete.

    Args:
        path: the file to write; its folder is made if need be.
        write: called once with the open file; may also write to the file by its name.

    Raises:
        CheckpointError: if ``path`` is a folder other than a sharded checkpoint.
        Exception: whatever ``write`` raised; the previous file is then untouched and nothing temporary remains.
    """
    path = Path(path)
    prepare(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def prepare(path: Path) -> None:
    """Make ready to write ``path``: check what stands there, make its folder, remove what dead saves left behind.

    Raises:
        CheckpointError: if ``path`` is a folder other than a sharded checkpoint, which a save must not replace.
    """
    if path.is_dir() and any(path.iterdir()) and not (path / HEADER).is_file():
        raise CheckpointError(
            f"Cannot save a checkpoint as '{path}': that is a folder, and not one that lit_zero wrote. Choose another"
            " path or remove it."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if standing(path) != path:
        os.rename(standing(path), path)
    for leftover in _siblings(path, "tmp") + _siblings(path, "old"):
        remove(leftover)


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside ``path`` that no other save uses."""
    return path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Let the complete ``temporary`` (a file or a folder) take the place of ``path``, and remove what stood there.

    On Linux a folder is swapped with the old one atomically. Where the file system cannot do that, two renames follow
    one another; killed between the two, the old folder stays complete under a hidden name, where ``standing`` finds it.
    """
    if os.path.lexists(path) and (temporary.is_dir() or path.is_dir()):
        if exchange(temporary, path):
            old = temporary
        else:
            old = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
            os.rename(path, old)
            try:
                os.rename(temporary, path)
            except BaseException:
                os.rename(old, path)
                raise
        sync_folder(path.parent)
        remove(old)
    else:
        os.replace(temporary, path)
        sync_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically; return False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def standing(path: Path) -> Path:
    """Return where the checkpoint ``path`` is: there, or put aside by a save that was killed between two renames."""
    if not os.path.lexists(path) and path.parent.is_dir():
        for old in _siblings(path, "old"):
            return old
    return path


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its contents; no error if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut. File systems that cannot are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_file(path: str | os.PathLike[str], weights_only: bool | None = None) -> Any:
    """``torch.load`` onto the host; pages are read from the disk when they are touched, and errors say what to do.

    Args:
        path: a file that ``torch.save`` wrote, in today's format or the one before torch 1.6.
        weights_only: as in ``torch.load``; ``None`` means true.

    Raises:
        CheckpointError: if the file is missing, a folder, damaged, or holds objects that ``weights_only`` refuses.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"'{path}' is a folder where one checkpoint file was expected.")
    if not path.exists():
        raise CheckpointError(f"There is no checkpoint '{path}'.")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"The checkpoint '{path}' cannot be read: {error}.") from error
    try:
        # mmap needs the zip format, which torch.save writes since 1.6.
        return torch.load(
            path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=weights_only is not False
        )
    except MemoryError:
        raise
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint '{path}' holds an object whose class cannot be imported here: {error}. Install or import"
            " what defines it."
        ) from error
    except Exception as error:
        # A file that is no zip is refused by the unpickler too: only a whole zip can be a checkpoint with forbidden
        # objects.
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise CheckpointError(
                f"The checkpoint '{path}' holds objects ({named[1] if named else 'of an unknown class'}) other than"
                " tensors and plain containers; opening them may run code. If you trust the file, load it with"
                " weights_only=False (lit-zero consolidate: --trust)."
            ) from error
        raise CheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    first = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"The checkpoint '{path}' ({path.stat().st_size} bytes) is damaged or not a checkpoint ({first}). It may have"
        " been cut short while it was copied: copy it again, or go on from an earlier checkpoint."
    )


def _siblings(path: Path, kind: str) -> list[Path]:
    return sorted(p for p in path.parent.iterdir() if p.name.startswith(f".{path.name}.{kind}-"))
