"""A module in several pieces inside Lightning's loops.

One step of a pipeline, from the strategy's side:

1. *Share.* The first rank of the pipeline sends its batch and a random seed to the others, so that all run the same.
2. *Run.* Every rank runs its part of the schedule: the user's own step on each micro-batch, up to the end of its stage
   (``pipeline.splitting``), and the backward. What the step logs is kept.
3. *Tell.* The last rank sends what the step has returned and logged to the others; all log the same, once.
4. *Publish.* Lightning calls ``zero_grad`` after the step and then ``backward``. There the gradients, which are
   complete already, are handed to the optimizers.

[Note: randomness] Micro-batches overlap, so one stream of random numbers cannot run through them in turn as in one
process. Every micro-batch starts from a seed of its own, made from one that is drawn for the step (``work.seed_of``);
the state travels with the activation from stage to stage. So one process that cuts the batch alike, seeds before each
micro-batch and adds up the losses times their shares of the rows computes the same numbers.

[Note: gradients come before zero_grad] In one process Lightning clears gradients after the user's step and before the
backward. Here the backward is over by then. So gradients that an earlier batch has left (its step was skipped, for an
overflow) are dropped when the step begins in which Lightning is going to clear them; what has been cleared too much is
handed over again by ``publish``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lit_zero.comm.open import open_exchange
from lit_zero.comm.transport import Transport
from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.core.holding import Holding
from lit_zero.pipeline.actions import Compute
from lit_zero.pipeline.lowering import lower
from lit_zero.pipeline.micro_batches import MicroBatches, cut
from lit_zero.pipeline.plan import SplitPlan
from lit_zero.pipeline.runner import Runner
from lit_zero.pipeline.schedule import Schedule, in_flight
from lit_zero.pipeline.schedules import build, forward_only
from lit_zero.pipeline.splitting import Split
from lit_zero.pipeline.timeline import Timeline
from lit_zero.strategy.calls import OutsideCalls
from lit_zero.strategy.dividing import Dividing
from lit_zero.strategy.flavour import TrainerFn
from lit_zero.strategy.logged import log_again, to_device
from lit_zero.strategy.measured import Metrics
from lit_zero.strategy.refusals import refuse_other_length, refuse_what_runs_once
from lit_zero.strategy.work import Work
from lit_zero.zero.engine import Engine
from lit_zero.zero.policy import Placement, Zero

if TYPE_CHECKING:
    from lit_zero.strategy.strategy import ZeroStrategy

_EVERY_UNIT = 1 << 30  # slots: as many as there are units
_TOLD = "told"  # key of the message in which the last rank tells what the step has returned and logged


class Stages(Dividing):
    """A pipeline.

    Args:
        strategy: whose module is divided.

    Attributes:
        timed: keep when each action of a step begins and ends, see ``timeline``.
    """

    whole, timed = False, False

    def __init__(self, strategy: ZeroStrategy) -> None:
        self._strategy, self.policy = strategy, strategy.pipeline
        self._transport: Transport | None = None
        self._split: Split | None = None
        self._plan: SplitPlan | None = None
        self._runner: Runner | None = None
        self._engine: Engine | None = None
        self._metrics: Metrics | None = None
        self._orders: dict[tuple[bool, int], Any] = {}
        self._alive: dict[int, int] = {}  # micro-batches of a stage at a time here, by how many there are
        self._written: set[str] = set()  # buffers that steps write to
        self._looking = False
        self._ran = 1  # micro-batches of the last training step
        self._trained = False  # the module was divided by what its training step does
        self._kept = False  # gradients were dropped that Lightning has yet to clear
        self._some = False  # training_step has returned a loss since gradients were cleared

    @property
    def in_step(self) -> bool:  # type: ignore[override]
        """Whether the user's step is running on micro-batches, on this rank alone."""
        return self._looking or (self._metrics is not None and self._metrics.in_step)

    @property
    def sent_bytes(self) -> int:  # type: ignore[override]
        """Bytes of activations and gradients of them that this rank has sent so far."""
        return 0 if self._transport is None else self._transport.sent_bytes

    @property
    def crowd(self) -> tuple[int, int]:  # type: ignore[override]
        """Micro-batches of the last training step, and how many of one stage were alive at a time on this rank."""
        if self._ran not in self._alive:
            stages: dict[int, list[Compute]] = {}
            for action in self.schedule(True, self._ran).orders[self._position]:
                stages.setdefault(action.stage, []).append(action)
            self._alive[self._ran] = max(in_flight(actions).held for actions in stages.values())
        return self._ran, self._alive[self._ran]

    @property
    def _position(self) -> int:
        return self._strategy.grid.position(self._strategy.global_rank)

    @property
    def _pipeline(self) -> Transport:
        assert self._transport is not None
        return self._transport

    def zero(self, zero: Zero) -> Zero:
        """Return the ZeRO stage as it is to be used: by default a unit is gathered, and its gradient reduced, once a
        step and not once a micro-batch.
        """
        sharded = zero.row.parameter is Placement.SHARD
        if zero.slots is not None and self.policy.schedule in ("zero_bubble", "zbv"):
            raise UnsupportedError(
                f"zero.slots={zero.slots} does not go with pipeline.schedule={self.policy.schedule!r}: the gradients "
                "of weights are computed long after those of inputs, and parameters must stay until then. Remove "
                "zero.slots, or use pipeline.schedule='1f1b'."
            )
        # Then what the data-parallel ranks exchange depends on the number of micro-batches, so it must be the same.
        self._alike = self._strategy.grid.data > 1 and (zero.slots is not None or zero.accumulate == "reduce")
        slots = zero.slots or (_EVERY_UNIT if sharded else None)
        return replace(zero, slots=slots, accumulate=zero.accumulate or "hold")

    # ---- setup

    def has(self, module: Any) -> bool:
        """Return whether ``module`` is the one that was divided here."""
        return self._split is not None and self._split.model is module

    def plan(self, trainer: Any) -> dict[str, Any]:
        """Divide the module; return what the engine must know of it. All ranks together."""
        strategy, module = self._strategy, self._module
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            refuse_what_runs_once(module)
        if not self.has(module):
            self._divide(trainer, None)
            self._trained = fitting
        else:
            assert self._split is not None
            self._split.remove()
            if fitting and not self._trained:
                self._divide_again(trainer)
                self._trained = True
        grid, rank = strategy.grid, strategy.global_rank
        assert self._plan is not None
        holders: dict[str, tuple[int, ...]] = {}
        for stage in self._plan.stages:
            for name in stage.parameters:
                holders[name] = tuple(sorted({*holders.get(name, ()), self._placement[stage.number]}))
        holding = Holding(grid.position(rank), holders)
        device, timeout = strategy.root_device, strategy.timeout
        if self._transport is None:
            self._transport = Transport(grid.pipelines(), device, timeout)
        ties = {}
        for positions in holding.ties():
            tie = open_exchange(strategy.comm, device, None, timeout, grid.tie_groups(positions), large=False)
            if holding.here(positions):
                ties[positions] = tie
        everyone = open_exchange(strategy.comm, device, None, timeout, large=False)
        return {"holding": holding, "everyone": everyone, "ties": ties}

    def attach(self, engine: Engine) -> None:
        """Work with a new engine: let go of what other ranks hold, and take the blocks' entries."""
        assert self._plan is not None
        module = self._module
        local = [stage for stage, position in enumerate(self._placement) if position == self._position]
        self._split = Split(module, self._recording, self._plan, local, engine.device)
        self._split.apply()
        params = dict(module.named_parameters())
        held = {stage: [params[name] for name in self._plan.stages[stage].parameters] for stage in local}
        self._runner = Runner(self._split, self._pipeline, held, len(self._plan.stages))
        self._engine = engine
        split = self._split

        def through(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.run("forward", lambda call: forward(*call[0], **call[1]), ((args, kwargs),), {})

        OutsideCalls(module, lambda: split.running or self._looking, through)
        last, grid = self._placement[-1], self._strategy.grid
        lasts = [grid.rank(last, number) for number in range(grid.data)]
        self._metrics = Metrics(module, self._states_from_last, lasts, last == self._position)

    def _states_from_last(self, value: Any) -> Any:
        states = self._pipeline.share(value, self._placement[-1], "states")
        self.flush()  # over gloo, no message comes back that would let them go, and they may be many
        return states

    def flush(self) -> None:
        """Return when all that this rank has sent to others of its pipeline arrives: it may end now."""
        if self._transport is not None:
            self._transport.flush()

    # ---- steps

    def schedule(self, training: bool, micro_batches: int) -> Schedule:
        """Return the order of a step with that many micro-batches."""
        policy = self.policy
        if training:
            return build(policy.schedule, policy.stages, micro_batches, ranks=policy.ranks)
        return forward_only(self._placement, micro_batches)

    def run(self, name: str, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step of the user's on every micro-batch, in this rank's part of the schedule."""
        assert self._runner is not None and self._engine is not None and self._metrics is not None
        training, transport, strategy = name == "training_step", self._pipeline, self._strategy
        alone = name == "forward"  # a call outside of a step: in one piece, and no random number is taken from the user
        if training:
            self._clear()
        seed = 0 if alone else int(torch.randint(0, 1 << 62, ()))
        final = not alone and self._is_final(name)
        batch, seed, ends = transport.share((args[0], seed, final), 0, "batch")
        if ends != final:
            refuse_other_length(transport.position, ends)
        if transport.position > 0 and not alone:
            batch = self._taken(batch)
        micro = MicroBatches([batch], [1]) if alone else self._micro_batches(batch)
        self._runner.timeline = [] if self.timed else None
        key = training, len(micro.parts)
        self._ran = len(micro.parts) if training else self._ran
        if key not in self._orders:
            self._orders[key] = lower(self.schedule(*key))[transport.position]

        def on_part(part: Any) -> Any:
            return step(part, *args[1:], **kwargs)

        last, teller = len(self._placement) - 1, self._placement[-1]
        afterwards = [] if transport.position == teller else [(_TOLD, teller)]
        work = Work(strategy, self._engine, self._metrics, name, last, micro, seed, on_part)
        with work.set_apart():
            results = self._runner.run(self._orders[key], work, afterwards)
        told = work.told(results) if results else None
        result, logged, updated = transport.share(told, teller, _TOLD)
        if not results:
            self._metrics.follow(updated)
        log_again(self._module, logged, strategy.root_device)
        if training:
            flag = torch.tensor([result is not None], dtype=torch.uint8, device=self._engine.device)
            self._some |= bool(self._engine.exchange.maximum(flag).item())
            result = torch.zeros(()) if result is None else result  # Lightning refuses None where there are ranks
        return to_device(result, strategy.root_device)

    def _is_final(self, name: str) -> bool:
        """Return whether this step's batch is the last that this rank reads in this epoch."""
        trainer = self._module.trainer
        loop = {"training_step": trainer.fit_loop.epoch_loop, "predict_step": trainer.predict_loop}.get(name)
        return bool((loop or trainer._evaluation_loop).batch_progress.is_last_batch)

    def _taken(self, batch: Any) -> Any:
        """Take over the batch of the first rank: what is logged is weighted by its rows."""
        strategy = self._strategy
        if strategy.root_device.type == "cuda":
            batch = strategy.batch_to_device(batch)
        results: Any = self._module.trainer._results
        if results is not None:
            results.batch, results.batch_size = batch, None
        return batch

    def _micro_batches(self, batch: Any) -> MicroBatches:
        """Cut a batch; where ranks count on it, into as many pieces as every other pipeline."""
        micro = cut(batch, self.policy)
        if not self._alike:
            return micro
        assert self._engine is not None
        fewest = self._fewest(len(micro.parts))
        if fewest < len(micro.parts):
            micro = cut(batch, self.policy, fewest)
        most = -self._fewest(-len(micro.parts))
        if most != len(micro.parts) or fewest != len(micro.parts):
            raise ConfigError(
                f"pipeline.split returned {len(micro.parts)} micro-batches here and {fewest} to {most} in other "
                "pipelines. With zero.slots or zero.accumulate='reduce' all need as many: return as many as count says."
            )
        return micro

    def _fewest(self, number: int) -> int:
        assert self._engine is not None
        found = self._engine.exchange.maximum(torch.tensor([-number], device=self._engine.device))
        return -int(found.item())

    def _clear(self) -> None:
        """Drop the gradients that Lightning is going to clear after the step."""
        assert self._engine is not None
        trainer = self._module.trainer
        self._kept = False
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches:
            return
        self._some = False
        for binding in self._engine.bindings:
            self._kept |= bool(binding.grads())
            binding.drop_gradients()

    def timeline(self) -> Timeline:
        """Return when every rank of this pipeline did what in the last step, by the clock of one machine. All ranks of
        the pipeline together; set ``timed`` before the step.
        """
        assert self._transport is not None and self._runner is not None
        found = self._transport.gather(self._runner.timeline or [])
        return Timeline.of((rank, *entry) for rank, entries in enumerate(found) for entry in entries)

    def publish(self) -> None:
        """Hand the gradients of the last step to the optimizers.

        Raises:
            UnsupportedError: if the user has kept gradients of an earlier step, which are dropped already.
        """
        assert self._engine is not None
        if self._kept and any(binding.grads() for binding in self._engine.bindings):
            raise UnsupportedError(
                "optimizer_zero_grad has left the gradients of an earlier step, to add to them. In a pipeline they are "
                "gone by then: the backward runs inside training_step. Use Trainer(accumulate_grad_batches=...)."
            )
        if self._some:
            self._engine.publish()
            return
        for binding in self._engine.bindings:  # as in one process: the optimizer has nothing to step with
            binding.drop_gradients()

    def share_buffers(self) -> None:
        """Bring the buffers, and the metrics that go into checkpoints, to what the ranks that change them have. All
        ranks together.
        """
        self.flush()
        if self._split is None or self._plan is None or self._metrics is None:
            return
        self._metrics.take_persistent()
        self.share(dict(self._split.model.named_buffers()))

    def share(self, buffers: dict[str, torch.Tensor]) -> None:
        """Bring tensors that stand for buffers, by name, to what ranks that change them have. All ranks together."""
        if self._split is None or self._plan is None or not self._written:
            return
        own = {
            name: buffers[name].detach().cpu()
            for stage in self._split.local
            for name in self._plan.stages[stage].buffers
            if name in self._written and name in buffers
        }
        for found in self._pipeline.gather(own):
            for name, value in found.items():
                if name not in own and name in buffers:
                    buffers[name].data.copy_(value)
