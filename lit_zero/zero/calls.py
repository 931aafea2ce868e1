"""What runs right before and right after a module's forward, in plain Python whatever is compiled.

[Note: hooks and torch.compile] Three ways lead to compiled blocks, and in none may our hooks be traced: they wait for
exchanges and look at states that change from call to call.

* ``block.forward = torch.compile(block.forward)``, or ``torch.compile(block)`` in the block's place: a module's hooks
  run outside of what is compiled anyway, and the whole forward is one graph.
* ``block.compile()``: what is compiled includes the module's hooks. So none are registered; the compiled call is
  wrapped instead, and again the whole forward is one graph.
* The whole model is compiled: tracing stops before a unit, goes on inside its forward and stops again behind it. The
  hooks are marked as not to be traced, and that is what stops it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

UNTRACED = "lit_zero brings and releases parameters between units"  # the reason that torch.compile tells


class Handle(Protocol):
    """What undoes something."""

    def remove(self) -> None:
        """Undo it."""


class _Unwrap:
    def __init__(self, module: nn.Module, compiled: Callable[..., Any], call: Callable[..., Any]) -> None:
        self._module, self._compiled, self._call = module, compiled, call

    def remove(self) -> None:
        if self._module._compiled_call_impl is self._call:  # else the user has compiled it anew
            self._module._compiled_call_impl = self._compiled


def around_forward(
    module: nn.Module, before: Callable[[Any, Any], None], after: Callable[[Any, Any, Any], None] | None
) -> list[Handle]:
    """Call ``before`` and ``after`` around every forward of ``module``, outside of what is compiled.

    Args:
        module: any module.
        before: called with args and kwargs, before the user's hooks.
        after: called with args, kwargs and the output, after the user's hooks; ``None`` for nothing.

    Returns:
        What undoes it.
    """
    before = torch.compiler.disable(before, reason=UNTRACED)
    after = after and torch.compiler.disable(after, reason=UNTRACED)
    compiled = module._compiled_call_impl
    if compiled is None:

        def pre_hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            before(args, kwargs)

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            assert after is not None
            after(args, kwargs, output)

        handles: list[Handle] = [module.register_forward_pre_hook(pre_hook, prepend=True, with_kwargs=True)]
        if after is not None:
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return handles

    def call(*args: Any, **kwargs: Any) -> Any:
        before(args, kwargs)
        output = compiled(*args, **kwargs)
        if after is not None:
            after(args, kwargs, output)
        return output

    module._compiled_call_impl = call
    return [_Unwrap(module, compiled, call)]
