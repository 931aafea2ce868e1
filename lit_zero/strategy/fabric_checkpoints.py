"""``fabric.save`` and ``fabric.load``: the modules and optimizers of a state are read from and written to shards.

The full format is the file that Fabric writes with one process: ``{"model": {...}, "optimizer": {...}, "step": 3}``,
whatever the keys are. The sharded format is the folder that a Trainer writes; the keys go along with what is no module
and no optimizer. Without them (a Trainer's checkpoint) the weights go by the key ``state_dict``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lit_zero.checkpoint import full, sharded
from lit_zero.checkpoint.files import load_file
from lit_zero.checkpoint.policy import Checkpoint
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError, LitZeroError, UnsupportedError
from lit_zero.strategy.checkpoints import Checkpoints
from lit_zero.strategy.flavour import _apply_filter, _validate_keys_for_strict_loading
from lit_zero.zero.calls import UNTRACED
from lit_zero.zero.engine import Engine

Found = TypeVar("Found")
Filter = Mapping[str, Callable[[str, Any], bool]]

_ADVICE = (
    "Save with fabric.save(path, state), get the weights with fabric.strategy.get_module_state_dict(model) on all "
    "ranks, and load weights before fabric.setup or with fabric.load."
)


class ManagedModule(nn.Module):
    """The user's module behind a door. Fabric sends the methods that the user has marked through the door, and refuses
    others that would run the module past it: without the door they would find parameters that are not there.

    Args:
        module: the user's module.
        engine: its engine.
        checkpoints: reads and writes its state.
    """

    def __init__(self, module: nn.Module, engine: Engine, checkpoints: Checkpoints) -> None:
        super().__init__()
        self.module, self.engine, self.checkpoints = module, engine, checkpoints

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's module."""
        self._follow_groups()
        return self.module(*args, **kwargs)

    @torch.compiler.disable(reason=UNTRACED)
    def _follow_groups(self) -> None:
        if torch.is_grad_enabled() and self.module.training:
            self.engine.follow_groups()


class Managed:
    """The modules that Fabric has set up, in that order, as long as the user holds them, a part of them or an
    optimizer: these lead to the engine, and the engine to the door.
    """

    def __init__(self) -> None:
        self._doors: list[weakref.ref[ManagedModule]] = []

    def __iter__(self) -> Iterator[ManagedModule]:
        return iter([door for held in self._doors if (door := held()) is not None])

    def add(self, module: nn.Module, engine: Engine, policy: Checkpoint) -> ManagedModule:
        """Take in a module, in the place of what was set up for it before."""
        checkpoints = Checkpoints(policy, module, _ADVICE)
        checkpoints.attach(engine)
        added = engine.door = ManagedModule(module, engine, checkpoints)
        self._doors = [weakref.ref(each) for each in (*self, added) if each is added or each.module is not module]
        return added

    def refuse_shared(self, module: nn.Module) -> None:
        """Raise if a module has a parameter of another one that was set up.

        Raises:
            UnsupportedError: naming it.
        """
        mine = {id(param) for param in module.parameters()}
        for each in self:
            for name, param in each.module.named_parameters():
                if each.module is not module and id(param) in mine:
                    raise UnsupportedError(
                        f"Parameter {name!r} of {type(each.module).__name__}, which Fabric has set up, is in "
                        f"{type(module).__name__} too. Set up one module that holds both."
                    )

    def any(self) -> ManagedModule:
        """Return the first module."""
        return next(iter(self))

    @property
    def alone(self) -> ManagedModule | None:
        """The only module that is trained, ``None`` if there are several: a frozen one takes part in no backward."""
        every = list(self)
        trained = [each for each in every if each.engine.bindings] or every
        return trained[0] if len(trained) == 1 else None

    def find(self, module: Any) -> ManagedModule | None:
        """Return a module by itself, its door, or what Fabric made of it; ``None`` if it is not managed."""
        for wrapper in ("_forward_module", "_orig_mod"):  # Fabric's, and inside it torch.compile's
            if isinstance(module, nn.Module):
                module = getattr(module, wrapper, module)
        return next((each for each in self if module is each or module is each.module), None)

    def of(self, module: Any) -> ManagedModule:
        """Return a module by itself, its door, or what Fabric made of it.

        Raises:
            LitZeroError: if Fabric has not set it up.
        """
        return _set_up(self.find(module), module, "fabric.setup_module(model)")

    def find_optimizer(self, optimizer: Any) -> tuple[ManagedModule, int] | None:
        """Return an optimizer's module and its number there, ``None`` if it is not managed."""
        for each in self:
            for number, binding in enumerate(each.engine.bindings):
                if binding.optimizer is optimizer:
                    return each, number
        return None

    def of_optimizer(self, optimizer: Any) -> tuple[ManagedModule, int]:
        """Return an optimizer's module and its number there.

        Raises:
            LitZeroError: if Fabric has not set it up.
        """
        return _set_up(self.find_optimizer(optimizer), optimizer, "fabric.setup_optimizers(optimizer)")


def _set_up(found: Found | None, wanted: Any, call: str) -> Found:
    if found is None:
        raise LitZeroError(
            f"{type(wanted).__name__} has not been set up with this strategy: call fabric.setup(model, optimizer) or "
            f"{call} first."
        )
    return found


def save(path: Any, state: Mapping[str, Any], filters: Filter, managed: Managed, policy: Checkpoint) -> None:
    """Write ``state`` in the format that ``policy`` says. All ranks must call this.

    Args:
        path: file or folder to write.
        state: modules, optimizers, and anything else.
        filters: by key of ``state``, which entries of its state dict are saved.
        managed: the modules that have engines.
        policy: the user's choice of format.

    Raises:
        UnsupportedError: for what the sharded format cannot hold.
        CheckpointError: on every rank, if it could not be written.
    """
    if policy.format == "sharded":
        _save_sharded(path, state, filters, managed)
        return
    content: dict[str, Any] = {}
    for key, value in state.items():
        each, bound = managed.find(value), managed.find_optimizer(value)
        if each is not None:
            found: Any = each.checkpoints.whole_weights()
        elif bound is not None:
            found = bound[0].checkpoints.whole_optimizer(bound[1])
        else:
            found = _plain(value)
        _apply_filter(key, dict(filters), found, content)
    full.save(content, path, World())


def _save_sharded(path: Any, state: Mapping[str, Any], filters: Filter, managed: Managed) -> None:
    modules = {key: each for key, value in state.items() if (each := managed.find(value)) is not None}
    optimizers = {key: bound for key, value in state.items() if (bound := managed.find_optimizer(value)) is not None}
    if len(modules) != 1 or any(each not in modules.values() for each, _ in optimizers.values()):
        raise UnsupportedError(
            f"A sharded checkpoint holds one module that Fabric has set up, and its optimizers; this state holds "
            f"{len(modules)} modules ({', '.join(modules) or 'none'}) and {len(optimizers)} optimizers "
            f"({', '.join(optimizers) or 'none'}). Save every module in a folder of its own, or use "
            "checkpoint='full'."
        )
    if set(filters) & set(optimizers):
        raise UnsupportedError(
            f"The filter of {', '.join(sorted(set(filters) & set(optimizers)))!r} cannot be applied: the state of an "
            "optimizer is not put together in a sharded checkpoint. Filter the module only, or use checkpoint='full'."
        )
    [(key, each)] = modules.items()
    extras: dict[str, Any] = {}
    for other, value in state.items():
        if other not in modules and other not in optimizers:
            _apply_filter(other, dict(filters), _plain(value), extras)
    extras[sharded.KEYS] = {"weights": key, "optimizers": list(optimizers)}
    wanted = filters.get(key, lambda name, value: True)
    entries = each.checkpoints.entries()
    pieces = entries.pieces(each.engine.parameter_pieces())
    # No rank has the whole values: a filter that reads them must fail, not decide differently on every rank.
    kept = {p.name for p in pieces if wanted(p.name, torch.empty(tuple(p.shape), dtype=p.dtype, device="meta"))}
    sharded.save(
        path,
        weights=[piece for piece in pieces if piece.name in kept],
        others={name: value for name, value in entries.others.items() if wanted(name, value)},
        aliases={alias: name for alias, name in entries.aliases.items() if name in kept},
        optimizers=[each.checkpoints.parts(number) for _, number in optimizers.values()],
        extras=extras,
        world=World(),
    )


def _plain(value: Any) -> Any:
    """Return what Fabric saves of a value that is not sharded."""
    if isinstance(value, Optimizer):
        return value.state_dict()
    stateful = callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
    return value.state_dict() if stateful else value


def load(path: Any, state: Any, strict: bool, weights_only: bool | None, managed: Managed) -> dict[str, Any]:
    """Read a checkpoint into ``state``. All ranks must call this.

    Args:
        path: file or folder to read.
        state: a dictionary, one module, one optimizer, or nothing.
        strict: refuse names that only ``state`` has, and parameters that only one side has.
        weights_only: as in ``torch.load``; ``None`` means true.
        managed: the modules that have engines.

    Returns:
        What ``state`` did not ask for.

    Raises:
        CheckpointError: if the checkpoint is not one of these modules and optimizers.
        KeyError: if it lacks a key of ``state`` and ``strict`` is true.
    """
    source = _Sharded(path, weights_only) if sharded.is_sharded(path) else _Full(path, weights_only)
    if not state:
        return source.everything()
    if isinstance(state, nn.Module | Optimizer):
        source.load_alone(state, managed, strict)
        return {}
    names = source.names()
    _validate_keys_for_strict_loading(state.keys(), names, strict=strict)
    for key, value in list(state.items()):
        if key not in names:
            continue
        each, bound = managed.find(value), managed.find_optimizer(value)
        if each is not None:
            source.load_weights(key, each.checkpoints, strict)
        elif bound is not None:
            source.load_optimizer(key, bound[0].checkpoints, bound[1])
        elif isinstance(value, nn.Module):
            value.load_state_dict(source.take(key), strict=strict)
        elif callable(getattr(value, "load_state_dict", None)) and callable(getattr(value, "state_dict", None)):
            value.load_state_dict(source.take(key))
        else:
            state[key] = source.take(key)
    return source.remainder()


@dataclass
class _Full:
    """One file."""

    path: Any
    weights_only: bool | None

    def __post_init__(self) -> None:
        self._content = load_file(self.path, self.weights_only)

    def everything(self) -> dict[str, Any]:
        """Return the content as it is."""
        content: dict[str, Any] = self._content
        return content

    remainder = everything  # what is loaded is taken out

    def names(self) -> set[str]:
        """Return the keys that have not been taken."""
        if not isinstance(self._content, dict):
            raise CheckpointError(f"'{self.path}' holds a {type(self._content).__name__}, a dict was expected.")
        return set(self._content)

    def take(self, key: str) -> Any:
        """Return and forget what is under ``key``."""
        return self._content.pop(key)

    def load_weights(self, key: str, checkpoints: Checkpoints, strict: bool) -> None:
        """Read a sharded module."""
        checkpoints.read_from(self.path)
        checkpoints.load_weights({"state_dict": self.take(key)}, strict)

    def load_optimizer(self, key: str, checkpoints: Checkpoints, number: int) -> None:
        """Read a sharded optimizer."""
        checkpoints.read_from(self.path)
        checkpoints.load_optimizer(number, self.take(key), number)

    def load_alone(self, target: nn.Module | Optimizer, managed: Managed, strict: bool) -> None:
        """Read a file that holds one state dict and nothing else."""
        each, bound = managed.find(target), managed.find_optimizer(target)
        self._content = {"": self._content}
        if each is not None:
            self.load_weights("", each.checkpoints, strict)
        elif bound is not None:
            self.load_optimizer("", bound[0].checkpoints, bound[1])
        elif isinstance(target, nn.Module):
            target.load_state_dict(self.take(""), strict=strict)
        else:
            target.load_state_dict(self.take(""))


@dataclass
class _Sharded:
    """One folder."""

    path: Any
    weights_only: bool | None

    def __post_init__(self) -> None:
        self._opened = sharded.ShardedCheckpoint(self.path, World(), self.weights_only)
        self._extras = self._opened.extras()
        kept = self._extras.pop(sharded.KEYS, {"weights": "state_dict", "optimizers": []})
        self._weights, self._optimizers = kept["weights"], kept["optimizers"]
        self._keys = {*self._extras, self._weights, *self._optimizers}

    def everything(self) -> dict[str, Any]:
        """There is no such thing in one process's memory."""
        raise CheckpointError(
            f"'{self.path}' is a sharded checkpoint: give fabric.load a state with the module to read it into "
            f"(its key is {self._weights!r}), or make one file of it with: lit-zero consolidate"
        )

    def remainder(self) -> dict[str, Any]:
        """Return what has not been taken."""
        return self._extras

    def names(self) -> set[str]:
        """Return all keys."""
        return self._keys

    def take(self, key: str) -> Any:
        """Return and forget what is under ``key``."""
        if key not in self._extras:
            raise CheckpointError(
                f"The sharded checkpoint '{self.path}' holds {key!r} in parts: only a module or optimizer that Fabric "
                "has set up can be loaded from it. Call fabric.setup first, or make one file of it with: lit-zero "
                "consolidate"
            )
        return self._extras.pop(key)

    def load_weights(self, key: str, checkpoints: Checkpoints, strict: bool) -> None:
        """Read a sharded module."""
        if key != self._weights:
            raise CheckpointError(f"'{self.path}' holds a module under {self._weights!r}, not under {key!r}.")
        checkpoints.read_from(self.path, self._opened)
        checkpoints.load_weights({}, strict)

    def load_optimizer(self, key: str, checkpoints: Checkpoints, number: int) -> None:
        """Read a sharded optimizer."""
        if key not in self._optimizers:
            raise CheckpointError(
                f"'{self.path}' holds optimizers under {', '.join(self._optimizers) or 'no key'}, not under {key!r}."
            )
        checkpoints.read_from(self.path, self._opened)
        checkpoints.load_optimizer(number, {}, self._optimizers.index(key))

    def load_alone(self, target: nn.Module | Optimizer, managed: Managed, strict: bool) -> None:
        """Read the weights into one module."""
        each = managed.find(target)
        if each is None:
            raise CheckpointError(
                f"'{self.path}' is a sharded checkpoint: it can be read into a module that Fabric has set up, not "
                f"into a {type(target).__name__} alone."
            )
        self.load_weights(self._weights, each.checkpoints, strict)
