"""What is read off a Trainer before training starts, and what lit_zero cannot do yet and refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import UnsupportedError
from lit_zero.strategy.flavour import TorchCheckpointIO, pl

# They copy the whole module, or write to single parameters, in ways that shards do not see.
_CALLBACKS = ("BaseFinetuning",)


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
    plugin = trainer.strategy.checkpoint_io
    if type(plugin) is not TorchCheckpointIO:
        raise UnsupportedError(
            f"The plugin {type(plugin).__name__} has no effect: ZeroStrategy writes checkpoints itself, from all "
            "ranks. Remove it from Trainer(plugins=...)."
        )
    for callback in trainer.callbacks:
        for name in _CALLBACKS:
            if _is_a(callback, name):
                raise UnsupportedError(
                    f"The callback {type(callback).__name__} does not work with ZeroStrategy yet: it works on whole "
                    "parameters. Remove it, or use strategy='ddp'."
                )


def refuse_no_optimizer(optimizers: Sequence[Any]) -> None:
    """Check that ``configure_optimizers`` returned an optimizer. Several are refused by Lightning itself, outside
    manual optimization.

    Raises:
        UnsupportedError: if there is none.
    """
    if not any(optimizer.param_groups for optimizer in optimizers):  # Lightning puts an empty one in place of None
        raise UnsupportedError(
            "configure_optimizers returned no optimizer; ZeroStrategy trains with exactly one. Return one, or use "
            "trainer.validate, test or predict, which need none."
        )


def refuse_tensors_without_memory(module: nn.Module) -> None:
    """Check a module whose parameters and buffers have been given memory for other tensors that still have none, such
    as the states of metrics.

    Raises:
        UnsupportedError: naming the module and the attribute.
    """
    for name, owner in module.named_modules():
        for key, value in vars(owner).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise UnsupportedError(
                    f"Module {name!r} ({type(owner).__name__}) was built on the meta device and keeps {key!r} there, "
                    "which is neither a parameter nor a buffer, so its value is lost. Build the module (a metric, for "
                    "example) in __init__ instead of configure_model, or under torch.device('cpu')."
                )


def accumulates(trainer: Any) -> bool:
    """Return whether, at some time, several micro-batches make a step."""
    scheduled = any(_is_a(callback, "GradientAccumulationScheduler") for callback in trainer.callbacks)
    return scheduled or trainer.accumulate_grad_batches > 1


def _is_a(callback: Any, name: str) -> bool:
    """Return whether ``callback`` is of the class ``name``, of whichever Lightning."""
    return any(kind.__name__ == name for kind in type(callback).__mro__)
