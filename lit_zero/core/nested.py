"""Find the tensors in whatever a module takes or returns."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in nested tuples, lists, deques, sets, mappings, dataclasses and plain objects' attributes.

    Args:
        value: any value. Objects of unknown classes are looked into one level deep by their ``__dict__``.
    """
    seen: dict[int, Any] = {}  # keeps what it has seen: an object made on the way would give its id to the next one
    stack = [(value, True)]
    while stack:
        item, look_inside = stack.pop()
        if isinstance(item, torch.Tensor):
            yield item
            continue
        if (
            item is None
            or isinstance(item, (bool, int, float, complex, str, bytes, torch.nn.Module))
            or id(item) in seen
        ):
            continue
        seen[id(item)] = item
        if isinstance(item, Mapping):
            stack += [(v, look_inside) for v in item.values()]
        elif isinstance(item, (tuple, list, set, frozenset, deque)):
            stack += [(v, look_inside) for v in item]
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            stack += [(getattr(item, f.name, None), look_inside) for f in dataclasses.fields(item)]
        elif look_inside and hasattr(item, "__dict__") and not isinstance(item, type):
            stack += [(v, False) for v in vars(item).values()]
