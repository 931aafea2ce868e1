"""How Lightning recognises the strategies: by name, and by class."""

from __future__ import annotations

from lit_zero.strategy.fabric import FabricZeroStrategy
from lit_zero.strategy.flavour import DDPStrategy, StrategyRegistry, fabric_strategies
from lit_zero.strategy.strategy import ZeroStrategy
from lit_zero.zero.policy import ROWS


def register() -> None:
    """Register ``zero0`` (nothing sharded) to ``zero3`` with Lightning; calling it again changes nothing."""
    for number, stage in enumerate(ROWS):
        name, description = f"zero{number}", f"lit_zero, zero.stage={stage!r}"
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, ZeroStrategy, description=description, zero=stage)
        if name not in fabric_strategies.STRATEGY_REGISTRY:
            fabric_strategies.STRATEGY_REGISTRY.register(name, FabricZeroStrategy, description=description, zero=stage)
    # Fabric takes instances of its own class only; what it is given becomes one [Note: one word for Trainer and Fabric]
    fabric_strategies.ParallelStrategy.register(ZeroStrategy)
    # A Trainer takes a compiled LightningModule only with DDP, FSDP or one device. It asks for these classes nowhere
    # else, except for FSDP's.
    DDPStrategy.register(ZeroStrategy)
