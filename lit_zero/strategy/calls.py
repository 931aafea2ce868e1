"""Calls of a module in several pieces, outside of the steps that Lightning runs.

``self(batch)`` in a hook, or a sampling loop after ``fit``, knows nothing of stages. So the module has a ``forward`` of
its own, which sends such a call through the pipeline as one micro-batch, and every rank gets the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import UnsupportedError


class OutsideCalls:
    """Takes the place of a module's ``forward``.

    Args:
        module: the user's module.
        inside: whether a step is running, whose calls are the user's own ``forward``.
        run: sends ``(forward, args, kwargs)`` through the pipeline.
    """

    def __init__(
        self,
        module: nn.Module,
        inside: Callable[[], bool],
        run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:
        before = vars(module).get("forward")
        self.forward: Callable[..., Any] = before.forward if isinstance(before, OutsideCalls) else module.forward
        self._name, self._inside, self._run = type(module).__name__, inside, run
        vars(module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._inside():
            return self.forward(*args, **kwargs)
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"{self._name} is in several pieces (pipeline.stages) and was called with gradients outside of its "
                "steps, where no backward can follow. Call it under torch.no_grad(), on all ranks, or in the step."
            )
        return self._run(self.forward, args, kwargs)
