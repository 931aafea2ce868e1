"""The user's choice of what computes a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_zero.core.errors import ConfigError, check_choice

KINDS = ("norms", "feed_forwards", "rotary")


@dataclass(frozen=True)
class Layers:
    """What computes the layers of a model.

    Fused layers have no second derivative: a backward with ``create_graph=True`` ends in an error that says so. Nor do
    functorch's transforms (``torch.func``) go through them.

    Args:
        variant: ``plain`` (the model's own code), or ``fused`` (known layers are replaced by fused ones).
        replace: ``fused`` only: kinds of layers, each of which must be found: ``norms``, ``feed_forwards``, ``rotary``.
            ``auto``: those that are found, at least one.

    Raises:
        ConfigError: for an unknown name, or a setting that has no effect in this variant.
    """

    variant: str = "plain"
    replace: Literal["auto"] | Sequence[str] = "auto"

    def __post_init__(self) -> None:
        check_choice("layers.variant", self.variant, ("plain", "fused"))
        kinds = self.replace
        if kinds == "auto":
            return
        if self.variant == "plain":
            raise ConfigError(
                f"layers.replace={kinds!r} has no effect with layers.variant='plain'. Remove it, or use "
                "layers.variant='fused'."
            )
        if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
            raise ConfigError(
                f"layers.replace={kinds!r} is not valid: expected 'auto' or a list such as ['norms', 'rotary']."
            )
        for kind in kinds:
            check_choice("layers.replace", kind, KINDS)
        object.__setattr__(self, "replace", tuple(kinds))  # whatever kind of list it was (Hydra has its own)
