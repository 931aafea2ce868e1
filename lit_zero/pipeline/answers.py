"""Answer for a module that is not here: outputs of the right structure, shape, dtype and device, and no memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from lit_zero.pipeline.dry import Dry
from lit_zero.pipeline.isolation import isolated
from lit_zero.pipeline.leaves import call_leaves, map_leaves
from lit_zero.pipeline.stand_in import StandIns

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class _Like:
    """In place of a tensor in a remembered output."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device


class _Echo:
    """In place of a tensor that the module has returned as it was given."""

    def __init__(self, path: str) -> None:
        self.path = path


class Answers:
    """Remembers what modules answer to which shapes.

    What a module answers is found by running it without values when inputs of a shape, dtype or plain value come for
    the first time; that changes nothing. Modules of one group answer alike and share what is remembered.

    Args:
        stand_ins: makes the tensors.
        device: where parameters on the meta device will be.
    """

    def __init__(self, stand_ins: StandIns, device: torch.device) -> None:
        self.stand_ins, self.device = stand_ins, device
        self.dry_runs = 0
        self._known: dict[Hashable, Any] = {}

    def answer(
        self,
        group: Hashable,
        module: nn.Module,
        real: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: bool,
    ) -> Any:
        """Return what ``real(*args, **kwargs)`` would return, without values.

        Args:
            group: equal for modules that answer alike.
            module: the module.
            real: its forward.
            args: as called.
            kwargs: as called.
            written: somebody will write to the output in place, so it must have memory.
        """
        inputs = dict(call_leaves(args, kwargs))
        mode = torch.is_grad_enabled(), module.training, _autocast(inputs)
        key = (group, mode, *[(path, _kind(leaf)) for path, leaf in inputs.items()])
        if key not in self._known:
            self._known[key] = self._find(module, real, args, kwargs)
        known = self._known[key]
        make = self.stand_ins.make_written if written else self.stand_ins.make
        if isinstance(known, _Like):  # mostly, and at once
            return make(known.shape, known.dtype, known.device)

        def fill(path: str, leaf: Any) -> Any:
            if isinstance(leaf, _Echo):
                return inputs[leaf.path]
            return make(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, _Like) else leaf

        return map_leaves(known, fill)

    def _find(self, module: nn.Module, real: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.dry_runs += 1
        gradients = torch.is_grad_enabled()
        dry = Dry(self.device, self.stand_ins.made)
        given = {id(leaf): path for path, leaf in call_leaves(args, kwargs) if isinstance(leaf, torch.Tensor)}
        args, kwargs = map_leaves(args, _own), map_leaves(kwargs, _own)
        with (
            torch.inference_mode(False),  # there, operators are not taken apart
            torch.set_grad_enabled(gradients),
            isolated(module, dry.replace, lambda buffer: _real_copy(buffer, self.device)),
            torch.compiler.set_stance("force_eager"),
            # A checkpoint around the call must not count what is saved here. Detached: a graph that kept its own output
            # through a hook would never go.
            torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach),
            dry,
        ):
            output = real(*args, **kwargs)

        def remember(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return _Echo(given[id(leaf)]) if id(leaf) in given else _Like(leaf)

        return map_leaves(output, remember)


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    if isinstance(leaf, _PLAIN):
        return type(leaf), leaf
    return type(leaf)


def _autocast(inputs: dict[str, Any]) -> Hashable:
    kinds = {leaf.device.type for leaf in inputs.values() if isinstance(leaf, torch.Tensor)}
    return frozenset((kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind))


def _own(path: str, leaf: Any) -> Any:
    """Return a copy of an object that the module may change, such as a cache of keys and values."""
    if isinstance(leaf, (torch.Tensor, nn.Module, *_PLAIN)) or callable(leaf):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # whatever the user's object raises: without a copy it is used as it is
        return leaf


def _real_copy(buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    if buffer.device.type == "meta":
        return torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    return buffer.detach().clone()
