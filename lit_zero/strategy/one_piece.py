"""What a strategy does where there is no pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_zero.zero.engine import Engine
from lit_zero.zero.policy import Zero


class OnePiece:
    """No pipeline: every rank holds the whole module.

    Attributes:
        whole: the module is in one piece.
        in_step: the user's step is running on micro-batches, on this rank alone.
        crowd: micro-batches that the last training step has run, and how many of them were alive at a time on this
            rank, at most.
        sent_bytes: of activations and gradients of them, by this rank so far.
    """

    whole = True
    in_step = False
    sent_bytes = 0
    crowd = (1, 1)

    def zero(self, zero: Zero) -> Zero:
        """Return the ZeRO stage as it is to be used."""
        return zero

    def plan(self, trainer: Any) -> dict[str, Any]:
        """Divide the module; return what the engine must know of it. All ranks together."""
        return {}

    def attach(self, engine: Engine) -> None:
        """Work with a new engine."""

    def run(self, name: str, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step of the user's."""
        return step(*args, **kwargs)

    def publish(self) -> None:
        """Hand the gradients of the last step to the optimizers."""

    def share(self, buffers: dict[str, Any]) -> None:
        """Bring tensors that stand for buffers to what the ranks that change them have."""

    def share_buffers(self) -> None:
        """Bring the buffers to what the ranks that change them have. All ranks together."""
