"""A module's own ``state_dict``, taken apart into the parameters that the engine manages and the rest.

[Note: a parameter is known by identity, not by name] What ``state_dict`` calls a parameter is up to the module: a hook
may rename entries (torch's ``checkpoint_wrapper`` does), while the engine goes by ``named_parameters``. An entry that
is a managed parameter must never be written as it is, because its memory is a buffer in which parameters take turns.
So entries are asked for as the parameters themselves (``keep_vars``) and recognised by identity, and the names of the
state dict are those of the checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import CheckpointError
from lit_zero.core.piece import ParamState, Piece
from lit_zero.zero.engine import Engine


@dataclass(frozen=True)
class Entries:
    """What a module's ``state_dict`` holds.

    Attributes:
        keys: all its keys, in order.
        sources: ``{key: the engine's name}`` of the entries that are managed parameters.
        others: the other entries: buffers, extra state, parameters without elements.
    """

    keys: list[str]
    sources: dict[str, str]
    others: dict[str, Any]

    @property
    def key_of(self) -> dict[str, str]:
        """``{the engine's name: its key}``, the first one where a tied parameter has several."""
        found: dict[str, str] = {}
        for key, name in self.sources.items():
            found.setdefault(name, key)
        return found

    @property
    def aliases(self) -> dict[str, str]:
        """``{further key of a tied parameter: its first key}``."""
        first = self.key_of
        return {key: first[name] for key, name in self.sources.items() if first[name] != key}

    def pieces(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Return the engine's pieces under the names that a checkpoint knows them by."""
        keys = self.key_of
        return [replace(piece, name=keys.get(piece.name, piece.name)) for piece in pieces]

    def states(self, states: Iterable[ParamState]) -> list[ParamState]:
        """Return the engine's optimizer states under the names that a checkpoint knows their parameters by."""
        keys = self.key_of
        return [
            replace(
                state,
                name=keys.get(state.name, state.name),
                tensors=dict(zip(state.tensors, self.pieces(state.tensors.values()), strict=True)),
            )
            for state in states
        ]


def entries_of(module: nn.Module, engine: Engine) -> Entries:
    """Take ``module.state_dict()`` apart. Hooks that guard it must be off.

    Args:
        module: what the engine manages.
        engine: says which parameters are managed, and how it names them.

    Raises:
        CheckpointError: for an entry that lies in the engine's memory without being a parameter of the module.
    """
    infos = engine.infos
    names = {id(info.param): info.name for info in infos}
    spelled = {**engine.aliases, **{info.name: info.name for info in infos}}
    memory = {info.param.untyped_storage().data_ptr() for info in infos}
    sources: dict[str, str] = {}
    others: dict[str, Any] = {}
    found = _state_dict(module)
    for key, value in found.items():
        # By name where a hook has put a tensor of its own in the parameter's place.
        name = names.get(id(value)) or spelled.get(key)
        if name is not None:
            sources[key] = name
            continue
        if isinstance(value, torch.Tensor):
            if value.numel() and (isinstance(value, nn.Parameter) or value.untyped_storage().data_ptr() in memory):
                raise CheckpointError(
                    f"{type(module).__name__}.state_dict() holds {key!r}, which is made of parameters but is none of "
                    "them, so its value cannot be collected from the ranks. A hook of state_dict may rename or leave "
                    "out parameters, not cut, join or add them: do that to the finished checkpoint."
                )
            value = value.detach()
        others[key] = value
    return Entries(list(found), sources, others)


def _state_dict(module: nn.Module) -> dict[str, Any]:
    """Return the state dict with the parameters themselves in it, as far as an override of it lets them through."""
    arguments = inspect.signature(module.state_dict).parameters.values()
    if any(argument.name == "keep_vars" or argument.kind is argument.VAR_KEYWORD for argument in arguments):
        return dict(module.state_dict(keep_vars=True))
    return dict(module.state_dict())
