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

    Which they are is learned from the first forward in each mode, by comparison: batch norms write to theirs without
    autograd's counter of versions.

    Args:
        module: the block.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._owners = [each for each in module.modules() if each._buffers]
        self._written: dict[tuple[bool, ...], set[str]] = {}  # by mode, training or evaluation, of every owner

    def before(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the buffers before a forward, and copies of them."""
        if not self._owners:
            return {}
        written = self._written.get(self._mode())
        found = self._module.named_buffers()
        return {name: (buffer, buffer.clone()) for name, buffer in found if written is None or name in written}

    def written(self, before: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return what those buffers were before a forward that it has written to."""
        if not self._owners:
            return {}
        if self._mode() not in self._written:
            now = dict(self._module.named_buffers())
            self._written[self._mode()] = {
                name
                for name, (buffer, copy) in before.items()
                if now.get(name) is not buffer or not torch.equal(buffer, copy)
            }
        return {name: before[name][1] for name in self._written[self._mode()] if name in before}

    def _mode(self) -> tuple[bool, ...]:
        return tuple(each.training for each in self._owners)

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
