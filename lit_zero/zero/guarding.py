"""What users may do to parameters behind the engine's back, and must not: it would be lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lit_zero.core.errors import LitZeroError
from lit_zero.zero.binding import Binding
from lit_zero.zero.lane import Lane


def refuse_lost_changes(lanes: Sequence[Lane], training: bool) -> None:
    """Check that every parameter is still what it was made.

    Args:
        lanes: all lanes.
        training: gradients are needed.

    Raises:
        LitZeroError: naming a parameter whose values, memory or need of a gradient have been changed.
    """
    for lane in lanes:
        name = lane.overwritten()
        if name is not None:
            raise LitZeroError(
                f"The values of parameter {name!r} were changed in place outside the optimizer; the change would be "
                "lost, since this strategy keeps the values that count elsewhere. Use "
                "trainer.strategy.full.set_parameter(name, value) on all ranks, or do it before setup."
            )
        name = lane.displaced()
        if name is not None:
            raise LitZeroError(
                f"The memory of parameter {name!r} was replaced after setup (by .to(), load_state_dict(assign=True) or "
                "p.data = ...); the optimizer would train a copy that nothing reads. Do that before setup, in "
                "__init__ or configure_model."
            )
        if training and not lane.trainable:
            thawed = next((i.name for i in lane.infos if i.param.requires_grad and i.group >= 0), None)
            if thawed is not None:
                raise LitZeroError(
                    f"Parameter {thawed!r} was frozen at setup and requires a gradient now, too late for this step. "
                    "Set requires_grad before a training step begins: in a hook such as on_train_epoch_start."
                )


def refuse_whole_state(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Stand before ``optimizer.load_state_dict``.

    Raises:
        LitZeroError: always: the optimizer holds segments, and the state is that of parameters.
    """
    raise LitZeroError(
        f"{type(optimizer).__name__}.load_state_dict would take the state of whole parameters for that of shards. "
        "Load a checkpoint: trainer.fit(ckpt_path=...), or fabric.load(path, {'optimizer': optimizer})."
    )


def refuse_stand_ins(binding: Binding) -> None:
    """Stand before ``optimizer.state_dict``.

    Raises:
        LitZeroError: if the states are kept elsewhere or in another form, so that the optimizer holds zeros for them.
    """
    if any(not kept.live for segment in binding.segments for kept in segment.kept.values()):
        raise LitZeroError(
            f"{type(binding.optimizer).__name__}.state_dict would hold zeros: its states are kept elsewhere or in "
            "small forms. Save with trainer.save_checkpoint(path) or fabric.save(path, ...), or read one with "
            "trainer.strategy.full.state(name, key)."
        )
