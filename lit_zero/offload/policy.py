"""The user's choice of where the shards of a rank live between uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lit_zero.core.errors import ConfigError, check_choice, check_local

PLACES = ("none", "cpu", "disk")
LEAST_CHUNK = 64 << 10  # bytes: a thousand elements of everything
CHUNK = 64 << 20  # bytes of a portion: long enough for a disk, short enough that two of them are little


@dataclass(frozen=True)
class Offload:
    """Which part of a rank's shards leaves the device, and where it goes. The optimizer steps there, on the CPU.

    Args:
        where: ``none`` (everything stays on the device), ``cpu`` (masters and optimizer state in host memory, pinned
            where there is a GPU), ``disk`` (both in files; the step reads and writes them in portions, and gradients
            wait for it in host memory).
        params: sharded parameters leave too, and are read again each time they are gathered. Needs
            ``zero.stage='stage3'``.
        ratio: part of the masters and their state that leaves, more than 0 and at most 1, to the nearest block or third
            of a block, evenly over the model.
        limit: most bytes of host memory that may be taken on each rank; more is refused before training starts.
            ``None``: no limit.
        folder: ``disk`` only: where the files are made, on any file system; a folder for each node is best. Every rank
            of every job has a file of its own there, which is gone when its process ends, however it ends.
        chunk: ``disk`` only: bytes of one portion; two are in memory at a time. Default 64 MiB.

    Raises:
        ConfigError: for an unknown name, a wrong type, or a setting that has no effect.
    """

    where: str = "none"
    params: bool = False
    ratio: float = 1.0
    limit: int | None = None
    folder: str | os.PathLike[str] | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_choice("offload.where", self.where, PLACES)
        if not isinstance(self.params, bool):
            raise ConfigError(f"offload.params={self.params!r} is not valid: expected true or false.")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise ConfigError(
                f"offload.ratio={self.ratio!r} is not valid: expected a number above 0 and at most 1, the part of the "
                "state that leaves the device. offload=none leaves all of it there."
            )
        for key in ("limit", "chunk"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"offload.{key}={value!r} is not valid: expected a number of bytes of at least 1.")
        if self.folder is not None and not isinstance(self.folder, str | os.PathLike):
            raise ConfigError(f"offload.folder={self.folder!r} is not valid: expected the path of a folder.")
        self._refuse_without_effect()
        if self.chunk is not None and self.chunk < LEAST_CHUNK:
            raise ConfigError(f"offload.chunk={self.chunk} is too little: expected at least {LEAST_CHUNK:,} bytes.")
        if self.where == "disk":
            if self.folder is None:
                raise ConfigError("offload.where='disk' needs offload.folder: say where its files may be made.")
            check_local("offload.folder", self.folder)

    def _refuse_without_effect(self) -> None:
        of = {"params": "cpu", "ratio": "cpu", "limit": "cpu", "folder": "disk", "chunk": "disk"}
        defaults = {"params": False, "ratio": 1.0, "limit": None, "folder": None, "chunk": None}
        for key, least in of.items():
            value = getattr(self, key)
            if PLACES.index(self.where) < PLACES.index(least) and value != defaults[key]:
                raise ConfigError(
                    f"offload.{key}={value!r} has no effect with offload.where={self.where!r}. Remove it, or use "
                    f"offload={least}."
                )

    @property
    def away(self) -> bool:
        """Whether anything leaves the device."""
        return self.where != "none"

    @property
    def portion(self) -> int:
        """Bytes of one portion."""
        return self.chunk or CHUNK

    def check_folder(self) -> None:
        """Check that a file can be made in the folder; the folder itself is made if need be.

        Raises:
            ConfigError: if not.
        """
        if self.folder is None:
            return
        from lit_zero.offload.file import open_file

        open_file(Path(self.folder)).close()
