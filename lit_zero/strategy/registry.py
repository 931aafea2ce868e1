"""The names under which a Trainer finds the strategies."""

from __future__ import annotations

from lit_zero.strategy.flavour import StrategyRegistry
from lit_zero.strategy.strategy import ZeroStrategy
from lit_zero.zero.policy import ROWS

# As Lightning's own: "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook".
START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register() -> None:
    """Register ``zero0`` (nothing sharded) to ``zero3`` with Lightning, each with the endings ``_spawn``, ``_fork`` and
    ``_notebook`` too; calling it again changes nothing.
    """
    for number, stage in enumerate(ROWS):
        for ending, method in START_METHODS.items():
            name = f"zero{number}{ending}"
            if name not in StrategyRegistry:
                what = f"lit_zero, zero.stage={stage!r}, start_method={method!r}"
                StrategyRegistry.register(name, ZeroStrategy, description=what, zero=stage, start_method=method)
