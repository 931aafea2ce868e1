"""What lit_zero cannot do yet, refused before training starts."""

from __future__ import annotations

from typing import Any

from lit_zero.core.errors import UnsupportedError
from lit_zero.strategy.flavour import pl

# They copy the whole module, or write to single parameters, in ways that shards do not see.
_CALLBACKS = ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging", "ModelPruning", "BaseFinetuning")


def refuse_unsupported(trainer: Any, module: pl.LightningModule) -> None:
    """Check a Trainer and its module for what ZeroStrategy cannot train.

    Raises:
        UnsupportedError: naming the feature and what to use instead.
    """
    if not module.automatic_optimization:
        raise UnsupportedError(
            f"{type(module).__name__} uses manual optimization (automatic_optimization=False), which ZeroStrategy "
            "does not support yet. "
            "Use automatic optimization, or strategy='ddp'."
        )
    for callback in trainer.callbacks:
        names = [kind.__name__ for kind in type(callback).__mro__]
        for name in _CALLBACKS:
            if name in names:
                raise UnsupportedError(
                    f"The callback {type(callback).__name__} does not work with ZeroStrategy yet: it works on whole "
                    "parameters. Remove it, or use strategy='ddp'."
                )


def refuse_several_optimizers(count: int) -> None:
    """Check the number of optimizers that ``configure_optimizers`` returned.

    Raises:
        UnsupportedError: if it is not one.
    """
    if count != 1:
        raise UnsupportedError(
            f"configure_optimizers returned {count} optimizers; ZeroStrategy trains with exactly one for now. Put the "
            "parameters into parameter groups of one optimizer."
        )
