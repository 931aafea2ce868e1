"""A module in several pieces inside Lightning's loops.

One step of a pipeline, from the strategy's side:

1. *Share.* The first rank of the pipeline sends its batch and a random seed to the others, so that all run the same.
2. *Run.* Every rank runs its part of the schedule: the user's own step on each micro-batch, up to the end of its stage
   (``pipeline.splitting``), and the backward. What the step logs is kept.
3. *Tell.* The last rank sends what the step has returned and logged to the others; all log the same, once.
4. *Publish.* Lightning calls ``zero_grad`` after the step and then ``backward``. There the gradients, which are
   complete already, are handed to the optimizers.

[Note: randomness] Micro-batches overlap, so one stream of random numbers cannot run through them in turn as in one
process. Every micro-batch starts from a seed of its own, drawn for the step; the state travels with the activation
from stage to stage. One stage (``OnePiece``) that runs the same micro-batches from the same seeds gets the same
numbers.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchmetrics import Metric

from lit_zero.comm.open import open_exchange
from lit_zero.comm.transport import Transport
from lit_zero.comm.world import World
from lit_zero.core.errors import LitZeroError, UnsupportedError
from lit_zero.core.holding import Holding
from lit_zero.pipeline.balance import balance
from lit_zero.pipeline.lowering import lower
from lit_zero.pipeline.micro_batches import MicroBatches, cut, mean, together
from lit_zero.pipeline.plan import SplitPlan, plan_split
from lit_zero.pipeline.recording import record
from lit_zero.pipeline.runner import Runner
from lit_zero.pipeline.schedule import Schedule
from lit_zero.pipeline.schedules import build, forward_only
from lit_zero.pipeline.splitting import Split
from lit_zero.pipeline.timeline import Timeline
from lit_zero.strategy.calls import OutsideCalls
from lit_zero.strategy.sample import sample_step
from lit_zero.zero.engine import Engine
from lit_zero.zero.policy import Placement, Zero

if TYPE_CHECKING:
    from lit_zero.strategy.strategy import ZeroStrategy

_EVERY_UNIT = 1 << 30  # slots: as many as there are units


class OnePiece:
    """No pipeline: every rank holds the whole module.

    Attributes:
        whole: the module is in one piece.
        sent_bytes: of activations and gradients of them, by this rank so far.
    """

    whole = True
    sent_bytes = 0

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

    def share_buffers(self) -> None:
        """Bring the buffers to what the ranks that change them have. All ranks together."""


class Stages(OnePiece):
    """A pipeline.

    Args:
        strategy: whose module is divided.

    Attributes:
        timed: keep when each action of a step begins and ends, see ``timeline``.
    """

    whole, timed = False, False

    def __init__(self, strategy: ZeroStrategy) -> None:
        self._strategy, self.policy = strategy, strategy_policy(strategy)
        self._transport: Transport | None = None
        self._split: Split | None = None
        self._plan: SplitPlan | None = None
        self._runner: Runner | None = None
        self._engine: Engine | None = None
        self._orders: dict[tuple[bool, int], Any] = {}

    @property
    def sent_bytes(self) -> int:  # type: ignore[override]
        """Bytes of activations and gradients of them that this rank has sent so far."""
        return 0 if self._transport is None else self._transport.sent_bytes

    @property
    def _position(self) -> int:
        return self._strategy.grid.position(self._strategy.global_rank)

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
        slots = zero.slots or (_EVERY_UNIT if sharded else None)
        return replace(zero, slots=slots, accumulate=zero.accumulate or "hold")

    # ---- setup

    def plan(self, trainer: Any) -> dict[str, Any]:
        """Divide the module; return what the engine must know of it. All ranks together."""
        strategy = self._strategy
        module = strategy.lightning_module
        assert module is not None
        previous = Engine.of(module)
        if previous is not None and previous.absent and (self._split is None or self._split.model is not module):
            raise UnsupportedError(
                f"This rank holds a part of {type(module).__name__} only: another Trainer has divided it into pipeline "
                "stages. Give this Trainer the same strategy object, or start from a checkpoint."
            )
        if self._split is None or self._split.model is not module:
            refuse_what_runs_once(module)
            self._divide(trainer, module)
        else:
            self._split.remove()
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

    def _divide(self, trainer: Any, module: nn.Module) -> None:
        """Record the user's step on rank 0, and choose the boundaries."""
        world, policy = World(), self.policy
        call = sample_step(trainer, lambda batch: cut(batch, policy).parts[0])
        found: Any = None
        failed: Exception | None = None
        if world.rank == 0:
            try:
                recording = record(module, call, policy.blocks, self._strategy.root_device)
                boundaries = policy.boundaries
                if boundaries is None:
                    boundaries = balance(recording, policy.stages, policy.balance)
                found = recording, plan_split(recording, boundaries)
            except LitZeroError as error:
                found = error
            except Exception as error:  # the user's code: the others must not wait for what does not come
                failed = error
                found = LitZeroError(f"{type(module).__name__} failed on rank 0 in the dry run of its step: {error!r}")
        found = world.broadcast_object(found)
        if failed is not None:
            raise failed
        if isinstance(found, LitZeroError):
            raise found
        self._recording, self._plan = found
        self._placement = build(policy.schedule, policy.stages, policy.pieces, ranks=policy.ranks).placement

    def attach(self, engine: Engine) -> None:
        """Work with a new engine: let go of what other ranks hold, and take the blocks' entries."""
        assert self._plan is not None and self._transport is not None
        module = self._strategy.lightning_module
        assert module is not None
        local = [stage for stage, position in enumerate(self._placement) if position == self._position]
        self._split = Split(module, self._recording, self._plan, local, engine.device)
        self._split.apply()
        params = dict(module.named_parameters())
        held = {
            stage: [p for name in self._plan.stages[stage].parameters if (p := params[name]).requires_grad]
            for stage in local
        }
        self._runner = Runner(self._split, self._transport, held, len(self._plan.stages))
        self._engine = engine
        split = self._split

        def through(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self.run("forward", lambda call: forward(*call[0], **call[1]), ((args, kwargs),), {})

        OutsideCalls(module, lambda: split.running, through)
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.dist_sync_fn = self._states_of_the_last

    def _states_of_the_last(self, state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        """Return a metric's state on the ranks that have updated it: those of the last stage."""
        found = World().all_gather_object(state.cpu())
        last, grid = self._placement[-1], self._strategy.grid
        return [found[grid.rank(last, number)].to(state.device) for number in range(grid.data)]

    # ---- steps

    def schedule(self, training: bool, micro_batches: int) -> Schedule:
        """Return the order of a step with that many micro-batches."""
        policy = self.policy
        if training:
            return build(policy.schedule, policy.stages, micro_batches, ranks=policy.ranks)
        return forward_only(self._placement, micro_batches)

    def run(self, name: str, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a step of the user's on every micro-batch, in this rank's part of the schedule."""
        assert self._transport is not None and self._runner is not None and self._engine is not None
        training, transport = name == "training_step", self._transport
        whole = name == "forward"  # a call outside of a step: in one piece, and no random number is taken from the user
        mine = (args[0], 0 if whole else int(torch.randint(0, 1 << 62, ())))
        batch, seed = transport.share(mine, 0)
        batch = self._strategy.batch_to_device(batch) if transport.position > 0 and _on_gpu(self._strategy) else batch
        micro = MicroBatches([batch], [1]) if whole else cut(batch, self.policy)
        self._runner.timeline = [] if self.timed else None
        key = training, len(micro.parts)
        if key not in self._orders:
            self._orders[key] = lower(self.schedule(*key))
        work = _Work(self, name, micro, seed, lambda part: step(part, *args[1:], **kwargs))
        with work.set_apart():
            results = self._runner.run(self._orders[key][transport.position], work)
        told = work.told([results[number] for number in sorted(results)]) if results else None
        result, logged = transport.share(told, self._placement[-1])
        self._log(logged)
        return _to(result, self._strategy.root_device)

    def timeline(self) -> Timeline:
        """Return when every rank of this pipeline did what in the last step, by the clock of one machine. All ranks of
        the pipeline together; set ``timed`` before the step.
        """
        assert self._transport is not None and self._runner is not None
        found = self._transport.gather(self._runner.timeline or [])
        return Timeline.of((rank, *entry) for rank, entries in enumerate(found) for entry in entries)

    def _log(self, logged: list[tuple[str, Any, dict[str, Any]]]) -> None:
        module = self._strategy.lightning_module
        assert module is not None
        for name, value, arguments in logged:
            if isinstance(value, _MetricValue):
                metric: Any = module.get_submodule(value.name)
                metric._forward_cache = _to(value.latest, self._strategy.root_device)
                metric._update_count, value_ = max(metric._update_count, value.updates), metric
                module.log(name, value_, **arguments)
            else:
                module.log(name, _to(value, self._strategy.root_device), **arguments)

    def publish(self) -> None:
        """Hand the gradients of the last step to the optimizers."""
        assert self._engine is not None
        self._engine.publish()

    def share_buffers(self) -> None:
        """Bring the buffers to what the ranks that change them have. All ranks together."""
        if self._transport is None or self._plan is None or self._split is None:
            return
        written = {facts.name for facts in self._recording.buffers if facts.written}
        buffers = dict(self._split.model.named_buffers())
        own = {
            name: buffers[name].detach().cpu()
            for stage in self._split.local
            for name in self._plan.stages[stage].buffers
            if name in written
        }
        if not written:
            return
        for found in self._transport.gather(own):
            for name, value in found.items():
                buffers[name].data.copy_(value)


class _MetricValue:
    """A metric that was logged: its name in the module, its value for the batch, and how often it was updated."""

    def __init__(self, name: str, latest: Any, updates: int) -> None:
        self.name, self.latest, self.updates = name, latest, updates


class _Work:
    """One step: the user's code on each micro-batch, and the engine.

    Args:
        stages: the pipeline.
        name: of the user's step.
        micro: the micro-batches.
        seed: from which every micro-batch's own is made.
        step: runs the user's step on a micro-batch.
    """

    def __init__(self, stages: Stages, name: str, micro: MicroBatches, seed: int, step: Callable[[Any], Any]) -> None:
        strategy = stages._strategy
        assert strategy.lightning_module is not None and stages._engine is not None
        self._module, self._engine, self._plugin = strategy.lightning_module, stages._engine, strategy.precision_plugin
        self._micro, self._seed, self._step = micro, seed, step
        self._device = strategy.root_device
        self._last = len(stages._placement) - 1
        self._training = name == "training_step"
        self._accumulate = self._module.trainer.accumulate_grad_batches if self._training else 1
        self._logged: dict[str, tuple[list[Any], dict[str, Any]]] = {}

    @contextlib.contextmanager
    def set_apart(self) -> Iterator[None]:
        """Inside, random numbers are those of micro-batches, and what is logged is kept."""
        numpy: Any = sys.modules.get("numpy")
        before = random.getstate(), numpy.random.get_state() if numpy else None
        devices = [self._device] if self._device.type == "cuda" else []
        module: Any = self._module
        with torch.random.fork_rng(devices=devices):
            module.log = self._ignore
            try:
                yield
            finally:
                del module.log
                random.setstate(before[0])
                if numpy:
                    numpy.random.set_state(before[1])

    def forward(self, stage: int, micro_batch: int) -> Any:
        """Run the user's step on a micro-batch."""
        self._engine.begin_forward(share_buffers=False)
        seed = (self._seed + 0x9E3779B97F4A7C15 * micro_batch) % (1 << 63)
        torch.manual_seed(seed)
        random.seed(seed)
        numpy: Any = sys.modules.get("numpy")
        if numpy:
            numpy.random.seed(seed % (1 << 32))
        module: Any = self._module
        module.log = self._keep if stage == self._last else self._ignore
        return self._step(self._micro.parts[micro_batch])

    def loss(self, micro_batch: int, result: Any) -> torch.Tensor | None:
        """Return a micro-batch's share of the loss, scaled as the precision wants it."""
        loss = result.get("loss") if isinstance(result, dict) else result
        if loss is None:
            return None
        part = loss * (self._micro.weights[micro_batch] / self._accumulate)
        scaler = getattr(self._plugin, "scaler", None)
        return part if scaler is None else scaler.scale(part)

    def backward(self, last: bool, run: Callable[[], None]) -> None:
        """Run a part of the backward; the last one begins to reduce the gradients."""
        if last:
            self._engine.begin_backward()
            run()
            return
        with self._engine.no_reduce():
            self._engine.begin_backward()
            run()
            self._engine.end_backward()

    def finish(self) -> None:
        """Return when the gradients are reduced."""
        if self._training:
            self._engine.end_backward()

    def landed(self, param: nn.Parameter) -> None:
        """Take a gradient that was computed outside of a backward."""
        self._engine.take(param)

    def random_state(self) -> Any:
        """Return the state of torch's random generators."""
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        return torch.get_rng_state().numpy().tobytes(), None if cuda is None else cuda.numpy().tobytes()

    def set_random_state(self, state: Any) -> None:
        """Go on from the state that has come with an activation."""
        cpu, cuda = state
        torch.set_rng_state(torch.frombuffer(bytearray(cpu), dtype=torch.uint8))
        if cuda is not None:
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(cuda), dtype=torch.uint8), self._device)

    # ---- logs

    def _ignore(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the rank of the last stage does."""

    def _keep(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise UnsupportedError(
                f"self.log({name!r}, value, ...) got further arguments by position; name them (prog_bar=True, ...)."
            )
        if isinstance(value, Metric):
            found = next((n for n, m in self._module.named_modules() if m is value), None)
            if found is None:
                raise UnsupportedError(
                    f"self.log({name!r}) got a metric that is not an attribute of {type(self._module).__name__}; the "
                    "other ranks of the pipeline cannot find it. Make it one in __init__."
                )
            value = _MetricValue(found, value._forward_cache, value._update_count)
        elif isinstance(value, torch.Tensor):
            value = value.detach().clone()
        values, arguments = self._logged.setdefault(name, ([], dict(kwargs)))
        if values and kwargs.get("batch_size") is not None:
            arguments["batch_size"] += kwargs["batch_size"]
        values.append(value)

    def told(self, results: list[Any]) -> tuple[Any, list[tuple[str, Any, dict[str, Any]]]]:
        """Return what the step has returned, and what it has logged, as if it had run once."""
        weights = self._micro.weights
        logged = [
            (name, _joined(values, weights, arguments), arguments) for name, (values, arguments) in self._logged.items()
        ]
        whole = None if any(result is None for result in results) else together(results, weights)
        if self._training and whole is None:
            whole = torch.zeros(())  # nothing to step with: no gradient has come
        return _to(whole, torch.device("cpu")), [(n, _to(v, torch.device("cpu")), a) for n, v, a in logged]


def _joined(values: list[Any], weights: list[float], arguments: dict[str, Any]) -> Any:
    """Return one value for those that were logged for each micro-batch."""
    if isinstance(values[0], _MetricValue):
        latest = [value.latest for value in values]
        if all(isinstance(value, torch.Tensor) and value.numel() == 1 for value in latest):
            joined: Any = mean([value.reshape(()) for value in latest], _even(latest, weights))
        else:
            joined = latest[-1]
        return _MetricValue(values[-1].name, joined, values[-1].updates)
    tensors = [torch.as_tensor(value, dtype=None).reshape(()) for value in values]
    how = str(arguments.get("reduce_fx", "mean"))
    for word, join in (("sum", torch.sum), ("min", torch.min), ("max", torch.max)):
        if word in how:
            return join(torch.stack(tensors))
    return mean(tensors, _even(tensors, weights))


def _even(values: list[Any], weights: list[float]) -> list[float]:
    """Return the weights of micro-batches, or even ones for a value that was not logged for every one."""
    return weights if len(values) == len(weights) else [1 / len(values)] * len(values)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, _MetricValue):
        return _MetricValue(value.name, _to(value.latest, device), value.updates)
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to(device), value)


def _on_gpu(strategy: Any) -> bool:
    return bool(strategy.root_device.type == "cuda")


def strategy_policy(strategy: Any) -> Any:
    """Return the pipeline that a strategy was given."""
    return strategy.pipeline


def refuse_what_runs_once(module: Any) -> None:
    """Refuse a module whose step cannot run once for each micro-batch, on every stage.

    Raises:
        UnsupportedError: saying what.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise UnsupportedError(
            f"{name} uses manual optimization: its backward is inside training_step, which a pipeline leaves at the "
            "end of each stage. Use automatic optimization, or pipeline=none."
        )
    if "backward" in {
        key
        for kind in type(module).__mro__
        for key in vars(kind)
        if not kind.__module__.startswith(("lightning", "pytorch_lightning", "torch"))
    }:
        raise UnsupportedError(
            f"{name} overrides backward, which a pipeline does not call: every stage has a backward of its own. Remove "
            "it, or use pipeline=none."
        )
