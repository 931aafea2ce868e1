"""Divide a module into stages: look at what its step does, on one rank, and choose the boundaries for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lit_zero.comm.world import World
from lit_zero.core.errors import LitZeroError, UnsupportedError
from lit_zero.pipeline.balance import balance
from lit_zero.pipeline.facts import Recording
from lit_zero.pipeline.measuring import measure
from lit_zero.pipeline.micro_batches import cut
from lit_zero.pipeline.plan import SplitPlan, plan_split
from lit_zero.pipeline.policy import Pipeline
from lit_zero.pipeline.recording import record
from lit_zero.pipeline.schedules import build
from lit_zero.strategy.flavour import TrainerFn
from lit_zero.strategy.measured import keep_apart
from lit_zero.strategy.one_piece import OnePiece
from lit_zero.strategy.sample import sample_step

if TYPE_CHECKING:
    from lit_zero.strategy.strategy import ZeroStrategy


class Dividing(OnePiece):
    """The plan of a pipeline.

    Attributes:
        policy: the user's choice.
    """

    policy: Pipeline
    _strategy: ZeroStrategy
    _recording: Recording
    _plan: SplitPlan | None
    _placement: tuple[int, ...]  # the position in the pipeline of every stage
    _written: set[str]  # buffers that steps write to
    _looking: bool  # at what the step does, on rank 0 alone

    @property
    def _module(self) -> Any:
        module = self._strategy.lightning_module
        assert module is not None
        return module

    def _divide(self, trainer: Any, boundaries: Any) -> None:
        """Record the user's step on rank 0, and choose the boundaries unless they are given."""
        world, policy, module = World(), self.policy, self._module
        sampled = sample_step(trainer, lambda batch: cut(batch, policy).parts[0])
        found: Any = None
        failed: Exception | None = None

        def call() -> Any:
            keep_apart(module)  # undone with all else that the dry run does
            return sampled()

        if world.rank == 0:
            self._looking = True
            try:
                recording = record(module, call, policy.blocks, self._strategy.root_device)
                boundaries = policy.boundaries if boundaries is None else boundaries
                if boundaries is None:
                    boundaries = balance(recording, policy.stages, self._costs(recording, call, trainer))
                found = recording, plan_split(recording, boundaries)
            except LitZeroError as error:
                found = error
            except Exception as error:  # the user's code: the others must not wait for what does not come
                failed = error
                found = LitZeroError(f"{type(module).__name__} failed on rank 0 in the dry run of its step: {error!r}")
            finally:
                self._looking = False
        found = world.broadcast_object(found)
        if failed is not None:
            raise failed
        if isinstance(found, LitZeroError):
            raise found
        self._recording: Recording
        self._recording, self._plan = found
        self._written |= {facts.name for facts in self._recording.buffers if facts.written}
        self._placement = build(policy.schedule, policy.stages, policy.pieces, ranks=policy.ranks).placement

    def _costs(self, recording: Recording, call: Callable[[], Any], trainer: Any) -> str | Sequence[float]:
        """Return what is evened out; measured here if it is to be."""
        policy, module = self.policy, self._module
        if policy.balance != "time":
            return policy.balance
        blocks, fitting = [block.name for block in recording.blocks], trainer.state.fn == TrainerFn.FITTING
        return measure(module, blocks, call, self._strategy.root_device, fitting)

    def _divide_again(self, trainer: Any) -> None:
        """Find out what the training step does with a module that was divided by what another step does."""
        before = self._plan
        assert before is not None
        self._divide(trainer, before.boundaries)
        assert self._plan is not None
        for old, new in zip(before.stages, self._plan.stages, strict=True):
            lacking = sorted(set(new.parameters) - set(old.parameters))
            if lacking:
                raise UnsupportedError(
                    f"training_step needs the parameter {lacking[0]!r} on stage {new.number}, but the module was "
                    "divided by what another step does, which does not. Call trainer.fit first, or give this fit a "
                    "module and a Trainer of its own."
                )
        # What only the other step needs stays where it is.
        stages = zip(before.stages, self._plan.stages, strict=True)
        merged = tuple(replace(new, parameters=old.parameters) for old, new in stages)
        self._plan = replace(self._plan, stages=merged)
