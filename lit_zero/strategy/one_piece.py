"""What a strategy does where there is no pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_zero.core.errors import UnsupportedError
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

    def flush(self) -> None:
        """Return when all that this rank has sent to others of its pipeline has left."""

    def has(self, module: Any) -> bool:
        """Return whether ``module`` is the one that was divided here."""
        return False

    def accept(self, module: Any, previous: Engine | None) -> None:
        """Refuse a module of which this rank holds a part only, unless it was divided here.

        Args:
            module: that is about to run.
            previous: the engine that manages it so far.

        Raises:
            UnsupportedError: saying what to go on with.
        """
        if previous is not None and previous.absent and not self.has(module):
            raise UnsupportedError(
                f"This rank holds a part of {type(module).__name__} only: another Trainer has divided it into pipeline "
                "stages, or this one before it ran another module. Go on with the Trainer that has divided it (fit, "
                "validate, test, predict) and give each module one of its own, or start from a checkpoint."
            )

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
