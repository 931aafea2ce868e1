"""What a block's forward depends on besides its arguments and parameters, so that it can run again alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import LitZeroError
from lit_zero.core.nested import tensors_in
from lit_zero.core.randomness import (
    generator_state,
    generators_in,
    random_states,
    set_generator_state,
    set_random_states,
)

Call = tuple[tuple[Any, ...], dict[str, Any]]
Found = dict[str, tuple[torch.Tensor, int, torch.Tensor | None]]  # buffers, their versions, and copies of some


class Surroundings:
    """What is around a block's calls.

    Args:
        module: the block.
    """

    def __init__(self, module: nn.Module) -> None:
        self._attributes = [vars(each) for each in module.modules()]

    def now(self, call: Call) -> Moment:
        """Return what is around a call that is about to run.

        Args:
            call: ``(args, kwargs)`` of the block.
        """
        args, kwargs = call
        held = generators_in(each for table in (*self._attributes, kwargs) for each in table.values())
        held += generators_in(args)
        return Moment({tensor.device.type for tensor in tensors_in(call)}, held)


class Moment:
    """The states of random generators, of autocast, and the default dtype, as they are now.

    Args:
        kinds: of the devices on which the block computes, such as ``cpu``.
        held: generators of the block's own.
    """

    def __init__(self, kinds: set[str], held: list[Any]) -> None:
        self._random = random_states()
        self._held = [(each, generator_state(each)) for each in held]
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
        held = [(each, generator_state(each)) for each, _ in self._held]
        with contextlib.ExitStack() as stack:
            for kind, enabled, lowered in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=lowered, enabled=enabled, cache_enabled=self._cache))
            _set(self._random, self._held)
            torch.set_default_dtype(self._dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(dtype)
                _set(random, held)


def _set(random: dict[str, Any], held: list[tuple[Any, Any]]) -> None:
    set_random_states(random)
    for generator, state in held:
        set_generator_state(generator, state)


class Buffers:
    """The buffers of a block that its forward writes to (batch statistics): a repetition finds them as the forward did,
    and what it does to them is lost.

    Which they are is learned from the first forward in each mode, by autograd's counter of versions and by comparison:
    batch norms write to theirs without it.

    Args:
        module: the block.
        title: the block, for messages.
    """

    def __init__(self, module: nn.Module, title: str) -> None:
        self._module, self._title = module, title
        self._owners = [each for each in module.modules() if each._buffers]
        self._written: dict[tuple[bool, ...], set[str]] = {}  # by mode, training or evaluation, of every owner

    def before(self) -> Found:
        """Return the buffers before a forward, their versions, and copies of those that it may write to."""
        if not self._owners:
            return {}
        written = self._written.get(self._mode())
        return {
            name: (buffer, version_of(buffer), buffer.clone() if written is None or name in written else None)
            for name, buffer in self._module.named_buffers()
        }

    def written(self, before: Found) -> dict[str, torch.Tensor]:
        """Return what those buffers were before a forward that it has written to.

        Raises:
            LitZeroError: if it has written to one that the first forward has left alone.
        """
        if not self._owners:
            return {}
        now, mode = dict(self._module.named_buffers()), self._mode()
        touched = {name for name, (was, version, _) in before.items() if _touched(was, version, now.get(name))}
        if mode not in self._written:
            touched |= {n for n, (was, _, copy) in before.items() if copy is not None and not torch.equal(was, copy)}
            self._written[mode] = touched
        sometimes = sorted(touched - self._written[mode])
        if sometimes:
            raise LitZeroError(
                f"Block {self._title!r} has written to its buffer {sometimes[0]!r}, and had not when it first ran, so "
                "there is no copy with which it could be computed again. Let it write in every forward or in none, or "
                "leave the block out with activation.blocks."
            )
        return {n: copy for n, (_, _, copy) in before.items() if copy is not None and n in self._written[mode]}

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


def version_of(tensor: torch.Tensor) -> int:
    """Return autograd's count of the writes to a tensor; a tensor of ``inference_mode`` has none."""
    return 0 if tensor.is_inference() else tensor._version


def _touched(was: torch.Tensor, version: int, now: torch.Tensor | None) -> bool:
    return now is None or now is not was or version_of(now) != version
