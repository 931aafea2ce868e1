"""The ZeRO engine: one mechanism for all stages.

A training step, from the engine's side:

1. *Forward.* Before a unit's module runs, its full parameters are brought (``gathering``); the next unit is requested
   meanwhile.
2. *Backward.* Before a unit's backward, sharded parameters are brought again; gradients land in flat buffers and are
   reduced over the ranks unit by unit (``reducing``).
3. *Step.* The user's optimizer updates this rank's master shards (``binding``); what other ranks hold of the parameters
   is old from then on.

Parameters keep their identity and shape throughout; only the memory behind them is ours (``lane``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_zero.comm.exchange import Exchange, Gather
from lit_zero.core.errors import LitZeroError
from lit_zero.core.piece import ParamState, Piece
from lit_zero.precision.policy import Lowering
from lit_zero.zero.agreeing import Reach, SharedBuffers
from lit_zero.zero.between import backward_is_running
from lit_zero.zero.binding import Binding, require_elementwise
from lit_zero.zero.build import build_unit, fill_lanes, number_groups
from lit_zero.zero.gathering import Gatherer
from lit_zero.zero.hooks import Hooks
from lit_zero.zero.lane import Lane, storage_bytes
from lit_zero.zero.norms import grad_norm, scale_to_norm
from lit_zero.zero.policy import Placement, Zero
from lit_zero.zero.reducing import Reducer
from lit_zero.zero.unit import Parameters, Unit
from lit_zero.zero.units import plan_units


class Engine:
    """Shards a module and its optimizers over the ranks of an exchange. All ranks must build it together.

    Args:
        model: the whole module, on any device, or (partly) on the meta device.
        optimizers: made on ``model``'s parameters; their groups are re-pointed to master shards.
        zero: stage, units, slots.
        exchange: the data-parallel ranks, see :func:`lit_zero.comm.open.open_exchange`.
        device: where the model computes.
        lowering: dtypes of the run.
        training: gradients will be needed; off, every parameter is treated as frozen.

    Attributes:
        parameter_count: elements of all managed parameters, over all ranks.
        exchange: carries and counts the bytes.

    Raises:
        UnsupportedError: if a parameter, module or optimizer cannot be managed; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        zero: Zero,
        exchange: Exchange,
        device: torch.device | str = "cpu",
        lowering: Lowering | None = None,
        training: bool = True,
    ) -> None:
        self.model, self.zero, self.exchange, self.device = model, zero, exchange, torch.device(device)
        self.row = zero.row.over(exchange.size)
        lowering = lowering or Lowering()
        self._handles: list[RemovableHandle] = []
        plans = plan_units(model, zero.units, lowering)
        infos = {info.name: info for plan in plans for info in plan.infos}
        for info in infos.values():
            info.trainable = info.trainable and training
        self.aliases = {alias: info.name for info in infos.values() for alias in info.aliases}
        self.parameter_count = sum(info.param.numel() for info in infos.values())
        grouped = number_groups(model, optimizers, infos)
        hold = (zero.accumulate or self.row.accumulate) == "hold" or self.row.optimizer is Placement.REPLICATE
        build = partial(build_unit, row=self.row, hold=hold, exchange=exchange, device=self.device, lowering=lowering)
        self.units = [build(plan, number) for number, plan in enumerate(plans)]
        self.root = self.units[0]
        fill_lanes(model, self.lanes, exchange, self.device)
        self._gatherer = Gatherer(self.units, exchange, zero.slots or 2, self.device, zero.poison)
        self._reducer = Reducer(self.units, exchange, self.device)
        trainable = [lane for lane in self.lanes if lane.trainable]
        self.bindings = [self._bind(optimizer, names, first, trainable) for optimizer, names, first in grouped]
        self._in_backward = False
        self._reach = Reach(trainable, exchange, self.device)
        self._buffers = SharedBuffers(model, exchange, self.device)
        self._gradient_bytes = 0
        self._hooks = Hooks(self.units, self._gatherer, self._reducer, self._gradient_comes)
        self._handles.append(model.register_forward_pre_hook(self._before_model, prepend=True))

    # ---- construction

    def _bind(self, optimizer: torch.optim.Optimizer, names: list[list[str]], first: int, lanes: list[Lane]) -> Binding:
        shaped = False
        try:
            require_elementwise(optimizer)
        except LitZeroError:
            if self.row.optimizer is Placement.SHARD or isinstance(optimizer, torch.optim.LBFGS):
                raise
            shaped = True
        binding = Binding(optimizer, names, first, lanes, shaped)
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._stepped(binding)))
        return binding

    def _before_model(self, *_: Any) -> None:
        self.begin_forward(share_buffers=torch.is_grad_enabled())  # one rank may sample from the model by itself

    @classmethod
    def of(cls, model: nn.Module) -> Engine | None:
        """Return the engine that manages ``model``, if there is one."""
        for hook in model._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, cls):
                return owner
        return None

    def detach(self) -> None:
        """Give the module back: full parameters on every rank, no hooks. All ranks together."""
        for unit in self.units:
            self._gatherer.need(unit)
            for lane in unit.lanes:
                if lane.lowered:  # what the module holds is a 2-byte copy: give the masters back, not their rounding
                    full = torch.empty(lane.numel, dtype=lane.master_dtype, device=self.device)
                    own = lane.master[lane.start - lane.master_start : lane.end - lane.master_start]
                    self.exchange.all_gather([Gather(full, own)]).wait()
                    lane.seat(full)
                elif unit.sharded:
                    for info in lane.infos:
                        info.param.data = info.param.data.clone()
            if unit.sharded:
                unit.state = Parameters.STALE
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooks.remove()
        self.exchange.close()

    # ---- forward

    @property
    def lanes(self) -> list[Lane]:
        """All lanes of all units."""
        return [lane for unit in self.units for lane in unit.lanes]

    def begin_forward(self, share_buffers: bool = True) -> None:
        """Make the root unit whole; call it before what runs without going through ``model.forward``.

        Args:
            share_buffers: let rank 0's buffers stand for all; all ranks must then call this together.
        """
        if backward_is_running():
            return
        self._gatherer.new_forward()
        self._gatherer.need(self.root)
        if share_buffers:
            self._buffers.share()

    # ---- backward

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward of ``loss`` and leave the reduced gradients with the optimizers."""
        self.begin_backward()
        loss.backward()
        self.end_backward()

    def begin_backward(self) -> None:
        """Call this right before a backward."""
        self._in_backward = True
        self._reducer.begin(fresh=all(binding.cleared for binding in self.bindings))

    def end_backward(self) -> None:
        """Call this right after a backward; returns when the gradients are reduced."""
        self._reducer.end()
        self._in_backward = False
        for unit in self.units:
            self._gatherer.backward_ends(unit)
            unit.calls = 0
        unreached = set() if self._reducer.deferred else self._reach.unreached()
        for binding in self.bindings:
            if unreached:
                binding.split()
            binding.attach(unreached)
        self._gradient_bytes = storage_bytes(chain(*(lane.state_tensors()["gradient"] for lane in self.lanes)), set())

    @contextlib.contextmanager
    def no_reduce(self) -> Iterator[None]:
        """Inside, a backward is one of several micro-batches of a step and not the last."""
        self._reducer.deferred = True
        try:
            yield
        finally:
            self._reducer.deferred = False

    def _gradient_comes(self) -> None:
        if not self._in_backward:  # the user called loss.backward() without us
            self.begin_backward()
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    # ---- step

    def step(self) -> None:
        """Step every optimizer. Gradients are dropped with the step that uses them."""
        for binding in self.bindings:
            binding.optimizer.step()

    def _stepped(self, binding: Binding) -> None:
        """The optimizer has changed this rank's masters."""
        binding.drop_gradients()
        self._check_seats()
        self.refresh()

    def refresh(self) -> None:
        """Make the masters' present values the parameters: call it after anything has written to the masters. All
        ranks together.
        """
        for lane in self.lanes:
            lane.publish()
        if self.row.optimizer is Placement.SHARD:
            self._gatherer.invalidate()
            self._gatherer.refresh_replicated()

    def _check_seats(self) -> None:
        for lane in self.lanes:
            name = lane.displaced()
            if name is not None:
                raise LitZeroError(
                    f"The memory of parameter {name!r} was replaced after setup (by .to(), "
                    "load_state_dict(assign=True) or p.data = ...); "
                    "the optimizer would train a copy that nothing reads. Do that before setup, in __init__ or "
                    "configure_model."
                )

    def grad_norm(self, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm of all reduced gradients, over all parameters and ranks, see ``norms.grad_norm``."""
        return grad_norm(self.bindings, self.exchange, self.device, norm_type)

    def clip_grad_norm(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Scale the gradients so that their norm is at most ``max_norm``; return the norm before."""
        norm = self.grad_norm(norm_type)
        scale_to_norm(self.bindings, norm, max_norm)
        return norm

    def clip_grad_value(self, max_value: float) -> None:
        """Clamp every gradient element to ``[-max_value, max_value]``."""
        for binding in self.bindings:
            for grad in binding.grads():
                grad.clamp_(-max_value, max_value)

    # ---- what others may ask

    def parameter_pieces(self, whole_if_replicated: bool = False) -> list[Piece]:
        """Return this rank's part of every parameter's master copy, in the same order on every rank.

        Args:
            whole_if_replicated: a replicated master gives its whole range, as a destination to load into; else every
                element belongs to exactly one rank.
        """
        pieces = []
        for lane in self.lanes:
            whole = self.row.optimizer is Placement.REPLICATE and whole_if_replicated
            start, end = (0, lane.numel) if whole else (lane.start, lane.end)
            shift = start - lane.master_start
            for part in lane.layout.overlaps(start, end):
                first = part.local + shift
                pieces.append(
                    Piece(part.entry.name, part.entry.shape, part.start, lane.master[first : first + part.length])
                )
        return pieces

    def describe_states(self, index: int, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """Return which state optimizer ``index`` has for which parameter, over all ranks.

        Args:
            index: number of the optimizer.
            gather: returns every rank's value of an object, in rank order.
        """
        described: dict[str, Any] = {}
        for found in gather(self.bindings[index].describe()):
            described.update(found)
        return described

    def optimizer_pieces(
        self, index: int, described: dict[str, Any], whole_if_replicated: bool = False
    ) -> list[ParamState]:
        """Return this rank's part of optimizer ``index``'s state, see :meth:`parameter_pieces`."""
        return self.bindings[index].states(described, whole_if_replicated)

    def wait_for_parameters(self) -> None:
        """Return when replicated parameters are up to date; sharded ones stay where they are."""
        for unit in self.units:
            if not unit.sharded:
                self._gatherer.need(unit)

    @contextlib.contextmanager
    def whole_parameters(self, unit: Unit) -> Iterator[None]:
        """Inside, ``unit``'s full parameters may be read. All ranks together."""
        unit.active += 1
        self._gatherer.need(unit)
        try:
            yield
        finally:
            unit.active -= 1
            self._gatherer.release(unit)

    def model_state_bytes(self) -> dict[str, int]:
        """Return the bytes of model states on this rank, counted from storages, each once.

        Returns:
            ``parameter``, ``master``, ``gradient`` and ``optimizer``: the model states of the ZeRO paper; gradients as
            they stood between the last backward and its step. ``slots``: buffers in which gathered parameters and
            landing gradients take turns, at their most.
        """
        seen: set[int] = set()
        tensors = [lane.state_tensors() for lane in self.lanes]
        found = {kind: storage_bytes(chain(*(t[kind] for t in tensors)), seen) for kind in ("parameter", "master")}
        found["gradient"] = self._gradient_bytes
        found["optimizer"] = storage_bytes(chain(*(binding.state_tensors() for binding in self.bindings)), seen)
        found["slots"] = storage_bytes([s.buffer for s in self._gatherer.slots], seen) + self._reducer.peak_bytes
        return found
