"""Run the user's code and leave no trace of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lit_zero.core.randomness import random_states, set_random_states

_OF_MODULES = set(vars(nn.Module()))  # parameters, buffers, hooks: not what a forward changes
_LOGS = ("log", "log_dict")  # of a LightningModule: they write to the trainer's tables


@contextmanager
def isolated(
    root: nn.Module,
    parameter: Callable[[nn.Parameter], nn.Parameter],
    buffer: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[None]:
    """Within, ``root`` works on other parameters and buffers; afterwards everything is as it was.

    Put back are parameters, buffers, attributes of all modules (also of metrics and of modules kept in plain lists),
    lists, sets, mappings and tensors in these attributes, and the state of all random generators. Not put back are
    changes inside objects of other classes, and what the code does outside (files, prints).

    Args:
        root: the module whose code is going to run.
        parameter: gives the one to use in place of a parameter.
        buffer: gives the one to use in place of a buffer.
    """
    found = list(_all_modules(root))
    saved = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers), dict(m._modules)) for m in found]
    states = random_states()
    others: dict[int, torch.Tensor] = {}

    def other(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in others:
            others[id(tensor)] = parameter(tensor) if isinstance(tensor, nn.Parameter) else buffer(tensor)
        return others[id(tensor)]

    try:
        with torch.no_grad():
            for module, attributes, parameters, buffers, _ in saved:
                for name, tensor in (parameters | buffers).items():
                    if tensor is not None:
                        (module._parameters if name in parameters else module._buffers)[name] = other(tensor)  # type: ignore[assignment]
                for name, value in attributes.items():
                    if name not in _OF_MODULES:
                        vars(module)[name] = _copy(value, other)
        yield
    finally:
        for module, attributes, parameters, buffers, modules in saved:
            vars(module).clear()
            vars(module).update(attributes)
            tables: Any = ((module._parameters, parameters), (module._buffers, buffers), (module._modules, modules))
            for now, then in tables:
                now.clear()
                now.update(then)
        set_random_states(states)


def take_logs(root: nn.Module, log: Callable[..., None], log_dict: Callable[..., None]) -> None:
    """Let others stand in for ``self.log`` and ``self.log_dict``; inside of :func:`isolated`, which undoes it.

    Args:
        root: the module whose code is going to run.
        log: stands in for the one.
        log_dict: stands in for the other.
    """
    for module in root.modules():
        if all(callable(getattr(module, name, None)) for name in _LOGS):
            vars(module)["log"], vars(module)["log_dict"] = log, log_dict


def _all_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Yield every module that ``root`` can reach, also through plain lists and mappings."""
    seen: set[int] = set()
    stack: list[Any] = [root]
    while stack:
        item = stack.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield item
            stack += item._modules.values()
            stack += (v for k, v in vars(item).items() if k not in _OF_MODULES and isinstance(v, (list, tuple, dict)))
        elif isinstance(item, dict):
            stack += (v for v in item.values() if isinstance(v, (nn.Module, list, tuple, dict)))
        elif isinstance(item, (list, tuple)):
            stack += (v for v in item if isinstance(v, (nn.Module, list, tuple, dict)))


def _copy(value: Any, other: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return other(value) if value.is_leaf or not value.requires_grad else value
    if type(value) in (list, tuple, set, deque):
        if any(isinstance(item, (torch.Tensor, list, tuple, dict, set, deque)) for item in value):
            return type(value)(_copy(item, other) for item in value)
        return value if type(value) is tuple else type(value)(value)
    if isinstance(value, dict):
        copied = value.copy()
        for key, item in value.items():
            if isinstance(item, (torch.Tensor, list, tuple, dict, set, deque)):
                copied[key] = _copy(item, other)
        return copied
    return value
