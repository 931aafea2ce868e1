"""Manual optimization: what Lightning does to the parameters in an optimizer's groups, done to the module's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lit_zero.strategy.flavour import pl
from lit_zero.strategy.precision import bare
from lit_zero.zero.engine import Engine

_METHODS = ("toggle_optimizer", "untoggle_optimizer")


def toggle_parameters(module: pl.LightningModule, engine: Callable[[], Engine]) -> None:
    """Let ``module.toggle_optimizer`` and ``untoggle_optimizer`` freeze the module's parameters.

    Lightning's freeze what stands in the optimizers' groups: here these are master shards, which no loss reaches.

    Args:
        module: the module; it gets the two methods as attributes of its own, see :func:`untouched`.
        engine: returns the engine.
    """
    before: dict[torch.nn.Parameter, bool] = {}

    def toggle_optimizer(optimizer: Any) -> None:
        untoggle_optimizer(optimizer)
        for binding in engine().bindings:
            mine = binding.optimizer is bare(optimizer)
            for lane in binding.lanes:
                for info in lane.infos:
                    before[info.param] = info.param.requires_grad
                    info.param.requires_grad_(mine and info.param.requires_grad)

    def untoggle_optimizer(optimizer: Any) -> None:
        for param, required in before.items():
            param.requires_grad_(required)
        before.clear()

    module.__dict__.update(zip(_METHODS, (toggle_optimizer, untoggle_optimizer), strict=True))


def untouched(module: pl.LightningModule) -> None:
    """Give ``module`` its class's methods back."""
    for name in _METHODS:
        module.__dict__.pop(name, None)
