"""What happens between two units in a backward: hooks on the tensors that go from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class _GradientHook:
    """What happens when the gradient of a tensor between two units is known: the later unit lets go before the
    earlier one asks.
    """

    def __init__(self, made_by: Any) -> None:
        self.made_by = (
            made_by  # the tensor's grad_fn: an in-place operation gives it another, which wants a hook of its own
        )
        self.first: list[Callable[[], None]] = []
        self.then: list[Callable[[], None]] = []

    def __call__(self, grad: torch.Tensor) -> None:
        for action in (*self.first, *self.then):
            action()


def _gradient_hook(tensor: torch.Tensor) -> _GradientHook:
    for hook in (tensor._backward_hooks or {}).values():
        if isinstance(hook, _GradientHook) and hook.made_by is tensor.grad_fn:
            return hook
    made = _GradientHook(tensor.grad_fn)
    tensor.register_hook(made)
    return made


def when_reached(tensor: torch.Tensor, action: Callable[[], None]) -> None:
    """Call ``action`` when a backward reaches the unit that made ``tensor``."""
    _gradient_hook(tensor).then.append(action)


def when_all_known(tensors: Sequence[torch.Tensor], action: Callable[[], None]) -> None:
    """Call ``action`` when the gradients of all of a unit's inputs are known: nothing in its backward is left to do.

    It comes before the actions of ``when_reached`` on the same tensor. Without tensors it is never called.
    """
    left = len(tensors)

    def known() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            action()

    for tensor in tensors:
        _gradient_hook(tensor).first.append(known)


def backward_is_running() -> bool:
    """Return whether this runs inside a backward (a recomputation, seen from a module's forward)."""
    return torch._C._current_graph_task_id() != -1
