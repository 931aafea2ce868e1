"""``lit_zero.json``: the small file that makes a folder a sharded checkpoint, checked before all others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lit_zero._version import __version__
from lit_zero.checkpoint.files import HEADER, standing
from lit_zero.core.errors import CheckpointError

FORMAT_VERSION = 1


@dataclass
class Header:
    """What a sharded checkpoint says of itself.

    Attributes:
        parameters: names of all parameters, without the second names of tied ones.
        buffers: names of the module's other tensors.
        aliases: second names of tied parameters, ``{alias: name in parameters}``.
        optimizers: per optimizer ``{"parameters": [[position, name, [keys of its state tensors]], ...]}``.
        ranks: number of ranks that wrote it.
        files: size of every other file in bytes, by name.
        format_version: of the folder's layout.
        lit_zero: version of lit_zero that wrote it.
        torch: version of torch that wrote it.
    """

    parameters: list[str]
    buffers: list[str]
    aliases: dict[str, str]
    optimizers: list[dict[str, Any]]
    ranks: int
    files: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    lit_zero: str = __version__
    torch: str = torch.__version__


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is a sharded checkpoint, also a damaged one; a look at one file name."""
    return (standing(Path(path)) / HEADER).is_file()


def write_header(folder: Path, header: Header) -> None:
    """Write the header, last of all files, and wait until it is on the disk."""
    with open(folder / HEADER, "w", encoding="utf-8") as file:
        json.dump({"format": "lit_zero sharded checkpoint", **asdict(header)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_header(path: Path) -> Header:
    """Read the header and check that every file is there in the size in which it was written.

    Raises:
        CheckpointError: if there is no such folder, if it is something else, from a newer version, or incomplete.
    """
    if path.is_file():
        raise CheckpointError(
            f"'{path}' is a file; a sharded checkpoint is a folder. If it is a plain .ckpt, it needs no conversion."
        )
    if not path.is_dir():
        raise CheckpointError(f"There is no checkpoint '{path}'.")
    if not (path / HEADER).is_file():
        hint = (
            " It is a folder of torch.distributed.checkpoint, which torch's dcp_to_torch_save opens."
            if (path / ".metadata").is_file()
            else ""
        )
        raise CheckpointError(f"The folder '{path}' is not a lit_zero checkpoint: it holds no {HEADER}.{hint}")
    try:
        values = json.loads((path / HEADER).read_text(encoding="utf-8"))
        version = int(values["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(_damaged(path, f"{HEADER} cannot be read ({error})")) from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint '{path}' has format version {version}, written by lit_zero {values.get('lit_zero')};"
            f" lit_zero {__version__} reads up to format version {FORMAT_VERSION}. Upgrade with:"
            " pip install --upgrade lit-zero"
        )
    try:
        header = Header(**{k: v for k, v in values.items() if k != "format"})
    except TypeError as error:
        raise CheckpointError(_damaged(path, f"{HEADER} cannot be read ({error})")) from error
    _check_files(path, header.files)
    return header


def _check_files(path: Path, files: Mapping[str, int]) -> None:
    wrong = []
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif file.stat().st_size != size:
            wrong.append(f"{name} has {file.stat().st_size} bytes of {size}")
    if wrong:
        raise CheckpointError(_damaged(path, "; ".join(wrong[:5]) + ("; ..." if len(wrong) > 5 else "")))


def _damaged(path: Path, what: str) -> str:
    return f"The checkpoint '{path}' is damaged: {what}. Copy it again as a whole, or go on from an earlier checkpoint."
