"""The names under which a Trainer finds the strategies."""

from __future__ import annotations

from lit_zero.strategy.flavour import StrategyRegistry
from lit_zero.strategy.strategy import ZeroStrategy
from lit_zero.zero.policy import ROWS


def register() -> None:
    """Register ``zero0`` (nothing sharded) to ``zero3`` with Lightning; calling it again changes nothing."""
    for number, stage in enumerate(ROWS):
        name = f"zero{number}"
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, ZeroStrategy, description=f"lit_zero, zero.stage={stage!r}", zero=stage)
