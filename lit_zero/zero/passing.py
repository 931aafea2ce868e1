"""The step inside the backward, from the engine's side [Note: the step inside the backward]."""

from __future__ import annotations

from lit_zero.core.errors import LitZeroError
from lit_zero.core.keeping import Keeping
from lit_zero.zero.binding import Binding
from lit_zero.zero.lane import Lane
from lit_zero.zero.reducing import Reducer


class Passing:
    """Steps lanes while a backward runs.

    Attributes:
        bindings: what stands for each optimizer.
        keeping: says whether lanes are stepped early.
    """

    keeping: Keeping
    bindings: list[Binding]
    _reducer: Reducer
    _passed: set[Lane] = frozenset()  # type: ignore[assignment]  # lanes that the present backward has stepped
    _passing = False

    def _check_passing(self) -> None:
        """Check that the backward that begins is the only one of a step, and belongs to it.

        Raises:
            LitZeroError: if not.
        """
        self._passing, self._passed = False, set()  # a backward that failed has left it on
        if not self.keeping.early:
            return
        if self._reducer.deferred:
            raise LitZeroError(
                "precision.step='backward' cannot accumulate: gradients of several micro-batches would stand all at "
                "once, which it is there to avoid. Set accumulate_grad_batches=1, or precision.step='after'."
            )
        if not all(binding.may_step for binding in self.bindings):
            raise LitZeroError(
                "precision.step='backward' steps inside the backward, but this backward does not run inside "
                "optimizer.step(closure). Call the optimizer with its closure in every step (as Lightning's own "
                "optimizer_step does), or set precision.step='after'."
            )
        if any(binding.had_backward for binding in self.bindings):
            raise LitZeroError(
                "precision.step='backward' steps inside the backward, and a second one began in the same "
                "optimizer.step(closure): it would step again what the first has stepped. Add the losses and call "
                "backward once, or set precision.step='after'."
            )
        for binding in self.bindings:
            binding.had_backward = True

    def _landed(self, lane: Lane) -> None:
        """Step a lane whose gradients are reduced, if it is certain that all of it is to be stepped."""
        if lane.optimizer < 0:
            lane.drop_gradients()  # nobody steps with them
        elif self._passing and all(lane.seen):
            self.bindings[lane.optimizer].step_lane(lane)
            self._passed.add(lane)
        else:
            lane.hold_gradient()

    def _refuse_passed(self) -> None:
        """Stand before what needs all gradients.

        Raises:
            LitZeroError: if they are gone.
        """
        if self.keeping.early:
            raise LitZeroError(
                "With precision.step='backward' there are no gradients to take a norm of, or to clip: each was stepped "
                "with and dropped inside the backward. To clip, set precision.step='after'; with "
                "precision.gradient_dtype='compute' beside it gradients take 2 bytes until the step."
            )
