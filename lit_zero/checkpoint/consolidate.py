"""A sharded checkpoint into one plain file, in one process, tensor by tensor.

[Note: tensors on the disk] ``torch.save`` and ``safetensors`` want all tensors at once. Each tensor is therefore given
storage in an unlinked scratch file beside the output and filled from the checkpoint: memory then holds one tensor at a
time, the kernel writes the rest out and reads it back when the file is written. The price is that much disk space for
a while.
"""

from __future__ import annotations

import importlib
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from lit_zero.checkpoint.dcp import Place
from lit_zero.checkpoint.files import write_file_atomic
from lit_zero.checkpoint.sharded import KEYS, WEIGHTS, ShardedCheckpoint
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError, ConfigError

PLAIN, SAFETENSORS = (".ckpt", ".pt", ".pth"), ".safetensors"

Progress = Callable[[int, int, str], None]  # (tensors done, tensors in all, name of the last one)


def consolidate(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    weights_only: bool | None = None,
    progress: Progress = lambda done, total, name: None,
) -> None:
    """Write a sharded checkpoint as one file that opens without lit_zero.

    ``.ckpt`` (``.pt``, ``.pth``) becomes a plain Lightning checkpoint with optimizer states, schedulers and loops, as a
    single-device run would have saved it; a tied parameter is stored once and found under all its names. What Fabric
    has saved gets the keys it was saved with.
    ``.safetensors`` holds the weights and buffers alone; there a tied parameter is stored under each of its names.

    Args:
        source: folder of the sharded checkpoint.
        target: file to write; its ending says which kind. It appears whole or not at all.
        force: replace a file that is there already.
        weights_only: as in ``torch.load``, for what is no tensor; ``None`` means true.
        progress: called after every tensor.

    Raises:
        ConfigError: if the ending of ``target`` is neither kind.
        CheckpointError: if ``source`` is no usable checkpoint, or ``target`` exists.
    """
    target = Path(target)
    if target.suffix not in (*PLAIN, SAFETENSORS):
        raise ConfigError(
            f"Cannot write '{target}': a name that ends in {', '.join(PLAIN)} or {SAFETENSORS} was expected."
        )
    save_file = _safetensors_writer() if target.suffix == SAFETENSORS else None
    if target.is_dir():
        raise CheckpointError(f"Cannot write '{target}': it is a folder.")
    if target.exists() and not force:
        raise CheckpointError(f"'{target}' exists already. Choose another name, or replace it with --force.")
    checkpoint = ShardedCheckpoint(source, World(), weights_only)
    reader = _Reader(checkpoint, target, progress)
    if save_file is None:
        content = _named({**reader.further(checkpoint.extras()), **reader.weights(), **reader.optimizers()})
        write_file_atomic(target, lambda file: torch.save(content, file))
    else:
        tensors = reader.separate_weights()
        write_file_atomic(target, lambda file: save_file(tensors, file.name, {"format": "pt"}))


def _named(content: dict[str, Any]) -> dict[str, Any]:
    """Give the weights and the optimizers the names that the user has chosen for them, if any."""
    keys = content.pop(KEYS, None)
    if keys is not None:
        content[keys["weights"]] = content.pop("state_dict")
        content.update(zip(keys["optimizers"], content.pop("optimizer_states", []), strict=True))
    return content


def _safetensors_writer() -> Callable[..., None]:
    try:
        writer: Callable[..., None] = importlib.import_module("safetensors.torch").save_file
        return writer
    except ImportError as error:
        raise ConfigError(
            f"Writing {SAFETENSORS} needs the package safetensors: pip install safetensors ({error})"
        ) from error


class _Reader:
    """Reads whole tensors, each into a scratch file of its own beside the output."""

    def __init__(self, checkpoint: ShardedCheckpoint, target: Path, progress: Progress) -> None:
        self._checkpoint, self._header, self._progress = checkpoint, checkpoint.header, progress
        self._target, self._done = target, 0
        self._names = [*self._header.parameters, *self._header.buffers]
        self._aliases = self._header.aliases
        states = [p for o in self._header.optimizers for p in o["parameters"]] if target.suffix in PLAIN else []
        again = self._aliases if target.suffix == SAFETENSORS else {}
        self._further = {p: checkpoint.names(p) for p in checkpoint.further} if target.suffix in PLAIN else {}
        self._total = len(self._names) + len(again) + sum(len(keys) for _, _, keys in states)
        self._total += sum(map(len, self._further.values()))

    def weights(self) -> dict[str, Any]:
        """Return ``{"state_dict": ...}`` with every name of the module; tied names share one tensor."""
        found = {name: self._weight(name) for name in self._names}
        found.update({alias: found[name] for alias, name in self._aliases.items()})
        return {"state_dict": {**found, **self._checkpoint.objects()}}

    def separate_weights(self) -> dict[str, torch.Tensor]:
        """Return every tensor of the module; tied names are separate tensors, which is what safetensors takes."""
        found = {name: self._weight(name) for name in self._names}
        return {**found, **{alias: self._weight(name) for alias, name in self._aliases.items()}}

    def optimizers(self) -> dict[str, Any]:
        """Return ``{"optimizer_states": [...]}`` as ``torch.optim`` saves them; nothing if there are none."""
        found = []
        for number, optimizer in enumerate(self._header.optimizers):
            scalars = self._checkpoint.scalars(number)
            state = {}
            for index, name, keys in optimizer["parameters"]:
                tensors = {key: self._state(number, name, key) for key in keys}
                if tensors or scalars[name]:
                    state[index] = {**scalars[name], **tensors}
            found.append({"state": state, "param_groups": self._checkpoint.param_groups(number)})
        return {"optimizer_states": found} if found else {}

    def further(self, extras: dict[str, Any]) -> dict[str, Any]:
        """Return ``extras`` with the tensors of further state dicts at their places."""
        for place, names in self._further.items():
            holder: dict[Any, Any] = extras
            for key in place:
                holder = holder[key]
            holder.update({name: self._weight(name, place) for name in names})
            holder.update({alias: holder[name] for alias, name in self._aliases.items() if name in holder})
        return extras

    def _weight(self, name: str, place: Place = WEIGHTS) -> torch.Tensor:
        tensor = self._empty(self._checkpoint.shape(name, place), self._checkpoint.dtype(name, place))
        self._checkpoint.read(tensor.view(-1), name, place)
        return self._count(name, tensor)

    def _state(self, number: int, name: str, key: str) -> torch.Tensor:
        tensor = self._empty(self._checkpoint.shape(name), self._checkpoint.state_dtype(number, name, key))
        self._checkpoint.read_state(tensor.view(-1), number, name, key)
        return self._count(f"{name} {key}", tensor)

    def _count(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self._done += 1
        self._progress(self._done, self._total, name)
        return tensor

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor that lies in a scratch file [Note: tensors on the disk]."""
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        self._target.parent.mkdir(parents=True, exist_ok=True)
        # The name is one that the next save of the same target removes, should this process be killed right here.
        with tempfile.NamedTemporaryFile(dir=self._target.parent, prefix=f".{self._target.name}.tmp-") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here; later it would be a SIGBUS
            storage = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(file.name, shared=True, nbytes=size))
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage).view(shape)
