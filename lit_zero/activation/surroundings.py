"""What a block's forward depends on besides its arguments and parameters, so that it can run again alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lit_zero.core.randomness import random_states, set_random_states


class Surroundings:
    """The states of all random generators, of autocast, and the default dtype, as they are now.

    Args:
        kinds: of the devices on which the block computes, such as ``cpu``.
    """

    def __init__(self, kinds: set[str]) -> None:
        self._random = random_states()
        self._autocast = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted(kinds | {"cpu"})
            if torch.amp.is_autocast_available(kind)
        ]
        self._cache = torch.is_autocast_cache_enabled()
        self._dtype = torch.get_default_dtype()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, they are as they were; afterwards, as if nothing had happened."""
        random, dtype = random_states(), torch.get_default_dtype()
        with contextlib.ExitStack() as stack:
            for kind, enabled, lowered in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=lowered, enabled=enabled, cache_enabled=self._cache))
            set_random_states(self._random)
            torch.set_default_dtype(self._dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(dtype)
                set_random_states(random)


class Buffers:
    """The buffers of a block that its forward writes to (batch statistics): a repetition finds them as the forward did,
    and what it does to them is lost.

    Which they are is learned from the first forward in each mode, training or evaluation.

    Args:
        module: the block.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._written: dict[bool, set[str]] = {}

    def before(self) -> dict[str, tuple[torch.Tensor, int, torch.Tensor | None]]:
        """Take note of the buffers before a forward."""
        written = self._written.get(self._module.training)
        return {
            name: (buffer, _version(buffer), buffer.clone() if written is None or name in written else None)
            for name, buffer in self._module.named_buffers()
        }

    def written(self, before: dict[str, tuple[torch.Tensor, int, torch.Tensor | None]]) -> dict[str, torch.Tensor]:
        """Return what those buffers were before a forward that it has written to."""
        now = dict(self._module.named_buffers()) if before else {}
        changed = {n for n, (old, version, _) in before.items() if now.get(n) is not old or version != _version(old)}
        known = self._written.setdefault(self._module.training, set())
        known |= changed
        return {name: copy for name, (_, _, copy) in before.items() if name in changed and copy is not None}

    @contextlib.contextmanager
    def as_before(self, written: dict[str, torch.Tensor]) -> Iterator[None]:
        """Inside, the module has those buffers, and may write to them."""
        places: list[tuple[dict[str, Any], str, Any]] = []
        for name, value in written.items():
            path, _, key = name.rpartition(".")
            table: Any = self._module.get_submodule(path)._buffers
            places.append((table, key, table[key]))
            table[key] = value.clone()
        try:
            yield
        finally:
            for table, key, value in places:
                table[key] = value


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
