"""The user's choice of a ZeRO stage. A stage is a row of data: what is replicated and what is sharded."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Literal

from lit_zero.core.blocks import Choice, check_modules
from lit_zero.core.errors import ConfigError, check_choice

Units = Choice


class Placement(enum.Enum):
    """Where a tensor lives on the data-parallel axis."""

    REPLICATE = "replicate"  # whole on every rank
    SHARD = "shard"  # an equal part on each rank


@dataclass(frozen=True)
class Row:
    """One ZeRO stage.

    Attributes:
        parameter: placement of the parameters between uses.
        gradient: placement of the gradients between backward and step.
        optimizer: placement of the fp32 master copy and the optimizer's state.
        accumulate: what several micro-batches per step do by default: ``hold`` sums them in a full local buffer and
            reduces once, ``reduce`` reduces each of them into the shard.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.
    """

    parameter: Placement
    gradient: Placement
    optimizer: Placement
    accumulate: Literal["hold", "reduce"]

    def in_passing(self) -> Row:
        """Return the row for steps inside the backward: gradients are nowhere kept whole."""
        return replace(self, gradient=Placement.SHARD)

    def over(self, ranks: int, apart: bool = False) -> Row:
        """Return what the row means on ``ranks`` ranks: a shard of one rank is the whole, unless shards live apart from
        what the device computes with (offload).
        """
        return self if ranks > 1 or apart else ROWS["none"]


_R, _S = Placement.REPLICATE, Placement.SHARD
ROWS = {
    "none": Row(_R, _R, _R, "hold"),
    "stage1": Row(_R, _R, _S, "hold"),
    "stage2": Row(_R, _S, _S, "reduce"),
    "stage3": Row(_S, _S, _S, "reduce"),
}


@dataclass(frozen=True)
class Zero:
    """Which model states are sharded over the data-parallel ranks, and in which portions they travel.

    Args:
        stage: ``none`` (every rank keeps everything, as DDP does), ``stage1`` (optimizer state sharded), ``stage2``
            (and gradients), ``stage3`` (and parameters).
        units: the modules whose parameters travel together. ``auto``: the blocks of every large repeated ``ModuleList``
            or ``Sequential``. Else class names and module-name patterns (``["Block", "encoder.layers.*"]``), or a
            callable ``(name, module) -> bool``. What belongs to no unit forms the root unit, which is whole from
            forward to step.
        slots: sharded parameters only: number of buffers that gathered units take turns in. Default 2: the unit at work
            and the one fetched ahead. 1 takes least memory and fetches nothing ahead. Memory: ``slots`` times the
            largest unit. In a pipeline, by default every unit of a rank's stages has a slot of its own, and is gathered
            once a step; with a number, once for each micro-batch and pass.
        accumulate: with ``accumulate_grad_batches > 1``: ``hold`` full gradients and reduce once per step (least
            traffic), or ``reduce`` every micro-batch into the shard (least memory). Default: the stage's own, see
            ``Row``. In a pipeline, whose micro-batches count too, ``hold``: the full gradients of a rank's stages.
        poison: sharded parameters only, for debugging: a released slot is filled with NaN, so that a parameter read
            while it is not there shows at once.

    Raises:
        ConfigError: for an unknown name, a wrong type, or a setting that has no effect in this stage.
    """

    stage: str = "stage2"
    units: Units = "auto"
    slots: int | None = None
    accumulate: str | None = None
    poison: bool = False

    def __post_init__(self) -> None:
        check_choice("zero.stage", self.stage, ROWS)
        if self.accumulate is not None:
            check_choice("zero.accumulate", self.accumulate, ("hold", "reduce"))
        if not isinstance(self.poison, bool):
            raise ConfigError(f"zero.poison={self.poison!r} is not valid: expected true or false.")
        if self.slots is not None and (
            isinstance(self.slots, bool) or not isinstance(self.slots, int) or self.slots < 1
        ):
            raise ConfigError(f"zero.slots={self.slots!r} is not valid: expected an integer of at least 1.")
        check_modules("zero.units", self.units)
        if self.row.optimizer is Placement.REPLICATE and self.accumulate == "reduce":
            raise ConfigError(
                f"zero.accumulate='reduce' has no place with zero.stage={self.stage!r}: every rank steps with whole "
                "gradients there. "
                "Remove zero.accumulate, or use zero.stage='stage1' or higher."
            )
        if self.row.parameter is Placement.REPLICATE:
            for key, value in (("slots", self.slots), ("poison", self.poison or None)):
                if value is not None:
                    raise ConfigError(
                        f"zero.{key}={value!r} has no effect with zero.stage={self.stage!r}: parameters are not "
                        "sharded there. "
                        f"Remove zero.{key}, or use zero.stage='stage3'."
                    )

    @property
    def row(self) -> Row:
        """The stage as data."""
        return ROWS[self.stage]
