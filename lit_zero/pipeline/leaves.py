"""Walk through the arguments and outputs of modules, whose structure must stay as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` in fixed order; lists, tuples, mappings and dataclasses are looked into, nothing else.

    Args:
        value: any value. Objects of other classes, such as a cache of keys and values, are leaves.
    """
    found: list[tuple[str, Any]] = []

    def take(path: str, leaf: Any) -> Any:
        found.append((path, leaf))
        return leaf

    map_leaves(value, take)
    yield from found


def call_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` of a call's arguments: ``args[0]``, ``kwargs['mask']``."""
    given = [(f"args[{index}]", value) for index, value in enumerate(args)]
    given += [(f"kwargs[{key!r}]", value) for key, value in kwargs.items()]
    for path, value in given:
        if isinstance(value, torch.Tensor):  # mostly, and at once
            yield path, value
        else:
            yield from ((path + further, leaf) for further, leaf in leaves(value))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among the leaves of ``value``."""
    if isinstance(value, torch.Tensor):  # mostly, and at once
        yield value
    else:
        yield from (leaf for _, leaf in leaves(value) if isinstance(leaf, torch.Tensor))


def map_leaves(value: Any, function: Callable[[str, Any], Any], path: str = "") -> Any:
    """Return ``value`` with ``function(path, leaf)`` in place of each leaf; what did not change stays the same object.

    Args:
        value: nested lists, tuples, mappings and dataclasses.
        function: gives the new leaf.
        path: of ``value`` itself.
    """
    if isinstance(value, torch.Tensor):
        return function(path, value)
    if isinstance(value, Mapping):
        items = {key: map_leaves(item, function, f"{path}[{key!r}]") for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        if type(value) is dict:
            return items
        changed: Any = copy.copy(value)
        for key, item in items.items():
            if item is not value[key]:
                changed[key] = item
        return changed
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        parts = [map_leaves(item, function, f"{path}[{index}]") for index, item in enumerate(value)]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        if type(value) in (list, tuple):
            return type(value)(parts)
        if isinstance(value, list):
            changed = copy.copy(value)
            changed[:] = parts
            return changed
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
        new = {name: map_leaves(item, function, f"{path}.{name}") for name, item in fields.items()}
        if all(new[name] is item for name, item in fields.items()):
            return value
        changed = copy.copy(value)
        for name, item in new.items():
            object.__setattr__(changed, name, item)  # also into a frozen one: the copy is ours
        return changed
    return function(path, value)
