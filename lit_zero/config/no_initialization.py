"""Build modules without giving their parameters values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode


@contextmanager
def no_initialization() -> Iterator[None]:
    """Inside, the functions of ``torch.nn.init`` do nothing.

    On the meta device they would do nothing either, but torch imports its compiler for some of them, which takes
    seconds.
    """
    with _NoInitialization():
        yield


class _NoInitialization(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)
