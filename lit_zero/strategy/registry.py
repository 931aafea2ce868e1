"""How Lightning recognises the strategies: by name, and by class."""

from __future__ import annotations

from lit_zero.strategy.fabric import FabricZeroStrategy
from lit_zero.strategy.flavour import DDPStrategy, StrategyRegistry, fabric_strategies
from lit_zero.strategy.strategy import ZeroStrategy
from lit_zero.zero.policy import ROWS

# As Lightning's own: "ddp", "ddp_spawn", "ddp_fork", "ddp_notebook".
START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def register() -> None:
    """Register ``zero0`` (nothing sharded) to ``zero3`` with Lightning, each with the endings ``_spawn``, ``_fork`` and
    ``_notebook`` too, and without them with Fabric; calling it again changes nothing.
    """
    for number, stage in enumerate(ROWS):
        for ending, method in START_METHODS.items():
            name = f"zero{number}{ending}"
            if name not in StrategyRegistry:
                what = f"lit_zero, zero.stage={stage!r}, start_method={method!r}"
                StrategyRegistry.register(name, ZeroStrategy, description=what, zero=stage, start_method=method)
        if f"zero{number}" not in fabric_strategies.STRATEGY_REGISTRY:
            fabric_strategies.STRATEGY_REGISTRY.register(
                f"zero{number}", FabricZeroStrategy, description=f"lit_zero, zero.stage={stage!r}", zero=stage
            )
    # Fabric takes instances of its own class only; what it is given becomes one [Note: one word for Trainer and Fabric]
    fabric_strategies.ParallelStrategy.register(ZeroStrategy)
    # A Trainer takes a compiled LightningModule only with DDP, FSDP or one device. It asks for these classes nowhere
    # else, except for FSDP's.
    DDPStrategy.register(ZeroStrategy)
