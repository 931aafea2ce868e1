"""What goes with small state, and what does not."""

from __future__ import annotations

from typing import Any

from lit_zero.core.errors import ConfigError
from lit_zero.offload.policy import Offload
from lit_zero.pipeline.policy import Pipeline
from lit_zero.precision.policy import Precision


def refuse_offload_of_small_state(offload: Offload, precision: Precision) -> None:
    """Check that state is to be small or elsewhere, not both.

    Raises:
        ConfigError: if both.
    """
    if offload.away and precision.small:
        raise ConfigError(
            f"{', '.join(precision.small)} does not go with offload.where={offload.where!r}: small forms lie on the "
            "device, and what is moved is stepped in fp32 elsewhere. Use offload=none, or leave out "
            f"{' and '.join(setting.split('=')[0] for setting in precision.small)}."
        )


def refuse_early_step_in_a_pipeline(precision: Precision, pipeline: Pipeline) -> None:
    """Check that the step is not inside the backward where a step has several backwards.

    Raises:
        ConfigError: if it is.
    """
    if precision.step == "backward" and pipeline.schedule != "none":
        raise ConfigError(
            f"precision.step='backward' does not go with pipeline.schedule={pipeline.schedule!r}: gradients of all "
            "micro-batches are summed before the step, so they stand all at once. Use precision.step='after', or "
            "pipeline=none."
        )


def refuse_early_step_by_hand(precision: Precision, what: str) -> None:
    """Refuse a step inside the backward where the user calls the two one after the other.

    Args:
        precision: the user's choice.
        what: who does so, for the message.

    Raises:
        ConfigError: if it is chosen.
    """
    if precision.step == "backward":
        raise ConfigError(
            f"precision.step='backward' needs automatic optimization, where Lightning runs the backward inside "
            f"optimizer.step(closure); {what} calls them one after the other. Use precision.step='after'."
        )


def check_small_state(precision: Precision, mode: str, trainer: Any) -> None:
    """Check the settings of small state against a Trainer.

    Args:
        precision: the user's choice.
        mode: ``Trainer(precision=...)``.
        trainer: the Trainer.

    Raises:
        ConfigError: for a setting that has no effect, or cannot be kept.
    """
    precision.check_mode(mode)
    if precision.step != "backward":
        return
    if not trainer.lightning_module.automatic_optimization:
        refuse_early_step_by_hand(precision, f"{type(trainer.lightning_module).__name__} (manual optimization)")
    if trainer.gradient_clip_val:
        raise ConfigError(
            f"precision.step='backward' does not go with gradient_clip_val={trainer.gradient_clip_val}: the norm of "
            "all gradients is known only when the backward is over, and by then they are gone. Use "
            "precision.step='after' (with precision.gradient_dtype='compute' gradients take 2 bytes), or set "
            "gradient_clip_val=None."
        )
    if trainer.accumulate_grad_batches > 1:
        raise ConfigError(
            f"precision.step='backward' does not go with accumulate_grad_batches={trainer.accumulate_grad_batches}: "
            "gradients of several micro-batches would stand all at once, which it is there to avoid. Use "
            "precision.step='after', or accumulate_grad_batches=1."
        )
