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
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import LitZeroError
from lit_zero.core.holding import Holding
from lit_zero.core.keeping import Keeping
from lit_zero.core.shards import WholeParameters
from lit_zero.precision.policy import Lowering
from lit_zero.zero.agreeing import Reach, SharedBuffers
from lit_zero.zero.between import backward_is_running, when_over
from lit_zero.zero.binding import Binding
from lit_zero.zero.build import build_lanes, empty, fill_lanes, group_names, number_groups
from lit_zero.zero.calls import UNTRACED, Handle
from lit_zero.zero.clipping import Clipping
from lit_zero.zero.gathering import Gatherer
from lit_zero.zero.guarding import refuse_lost_changes, refuse_stand_ins, refuse_whole_state
from lit_zero.zero.hooks import Hooks
from lit_zero.zero.lane import Lane
from lit_zero.zero.policy import Placement, Zero
from lit_zero.zero.probe import is_shaped
from lit_zero.zero.reducing import Reducer
from lit_zero.zero.regroup import Regrouping
from lit_zero.zero.sharing import SegmentShards
from lit_zero.zero.unit import Unit
from lit_zero.zero.units import plan_units


class Engine(Clipping, Regrouping):
    """Shards a module and its optimizers over the ranks of an exchange. All ranks must build it together.

    Args:
        model: the whole module, on any device, or (partly) on the meta device.
        optimizers: made on ``model``'s parameters; their groups are re-pointed to master shards.
        zero: stage, units, slots.
        exchange: the data-parallel ranks, see :func:`lit_zero.comm.open.open_exchange`.
        device: where the model computes.
        lowering: dtypes of the run.
        training: gradients will be needed; off, every parameter is treated as frozen.
        keep_gradients: until ``zero_grad``, as torch does; else they are dropped with the step that uses them.
        holding: which ranks of a pipeline hold which parameters; by default this one holds all.
        everyone: all ranks of all pipelines; by default those of ``exchange``.
        ties: for every group of positions that hold parameters together (``holding.ties()``), its ranks in the
            pipeline of this rank.
        keeping: where shards live between uses; by default on ``device``.

    Attributes:
        parameter_count: elements of all managed parameters, over all ranks.
        exchange: carries and counts the bytes.
        everyone: all ranks, for what they agree on.
        absent: parameters that other ranks of the pipeline hold.
        buffers: shares rank 0's buffers.

    Raises:
        UnsupportedError: if a parameter, module or optimizer cannot be managed; the message names it.
    """

    door: Any = None  # what Fabric calls the model through: it lives as long as the engine does

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
        keep_gradients: bool = False,
        holding: Holding | None = None,
        everyone: Exchange | None = None,
        ties: Mapping[tuple[int, ...], Exchange] | None = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.model, self.zero, self.exchange, self.device = model, zero, exchange, torch.device(device)
        self.everyone, self.ties, holding = everyone or exchange, ties or {}, holding or Holding()
        self.keeping, self._keep, self._training = keeping or Keeping(), keep_gradients, training
        row = zero.row.over(exchange.size, self.keeping.apart)
        self.row = row.in_passing() if self.keeping.early else row
        lowering = lowering or Lowering()
        self._handles: list[Handle] = []
        self._unannounced = False  # the present backward was begun by its first gradient
        plans = plan_units(model, zero.units, lowering)
        infos = {info.name: info for plan in plans for info in plan.infos}
        for info in infos.values():
            info.trainable = info.trainable and training
            info.holders = holding.of(info.name)
        self.aliases = {alias: info.name for info in infos.values() for alias in info.aliases}
        self.parameter_count = sum(info.param.numel() for info in infos.values())
        names = group_names(model, optimizers)
        number_groups(list(infos.values()), names)
        hold = (zero.accumulate or self.row.accumulate) == "hold" or self.row.optimizer is Placement.REPLICATE
        self._build_lanes = partial(
            build_lanes,
            row=self.row,
            hold=hold,
            exchange=exchange,
            device=self.device,
            lowering=lowering,
            holding=holding,
            keeping=self.keeping,
        )
        self.absent = [info for info in infos.values() if not holding.here(info.holders)]
        self.units = [
            Unit(plan.name, number, plan.module, self._build_lanes(plan.infos), plan.outer)
            for number, plan in enumerate(plans)
            if plan.name == "" or any(holding.here(info.holders) for info in plan.infos)
        ]
        self.root = self.units[0]
        self._position = {name: number for number, name in enumerate(infos)}
        fill_lanes(model, self.lanes, self.absent, exchange, self.ties, self.device)
        shaped = [is_shaped(optimizer, self.row, self.keeping.knobs) for optimizer in optimizers]
        self.bindings = [self._bind(*each) for each in zip(optimizers, range(len(names)), names, shaped, strict=True)]
        self._check_room()
        self._in_backward, self._gradient_bytes, self._host_gradient_bytes = False, 0, 0
        self.buffers = SharedBuffers(model, exchange, self.device)
        self._attached: list[tuple[Binding, set[Lane], set[str]]] = []  # by the last backward
        self._assemble()
        self._handles.append(model.register_forward_pre_hook(self._before_model, prepend=True))
        for lane in self.lanes:
            lane.note_versions()

    # ---- construction

    def _assemble(self) -> None:
        """Make what works on units as they are now."""
        self._gatherer = Gatherer(self.units, self.exchange, self.zero.slots or 2, self.device, self.zero.poison)
        landed = self._landed if self.keeping.early else None
        self._reducer = Reducer(self.units, self.exchange, self.device, landed)
        self._reach = Reach(self._trainable(), self.exchange, self.device, several=len(self.bindings) > 1)
        self._hooks = Hooks(self.units, self._gatherer, self._reducer, self._gradient_comes)

    def _trainable(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.trainable]

    def _bind(self, optimizer: torch.optim.Optimizer, number: int, names: list[list[str]], shaped: bool) -> Binding:
        binding = Binding(optimizer, names, number, self._trainable(), shaped, self.absent)
        if isinstance(optimizer, WholeParameters):
            optimizer.shards = SegmentShards(lambda: binding.segments, self.exchange)
        if self.keeping.walks:
            lowered = any(info.lowered_dtype != info.master_dtype for info in self.infos)  # also those to be thawed
            self.keeping.accept(type(optimizer).__name__, binding.contents(), lowered)
            self._handles.append(optimizer.register_state_dict_pre_hook(lambda _: refuse_stand_ins(binding)))
            run = Keeping().run if self._keep else self.keeping.run
            self._handles.append(binding.wrap_step(run, self.keeping.early))
        handle = optimizer.register_step_post_hook(lambda *_: self._stepped(binding))
        binding.post_hook = handle.id
        self._handles.append(handle)
        self._handles.append(optimizer.register_load_state_dict_pre_hook(refuse_whole_state))
        return binding

    @torch.compiler.disable(reason=UNTRACED)
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

    def __deepcopy__(self, memo: Any) -> Engine:
        """A copy would go through the original's hooks, or share its groups.

        Raises:
            LitZeroError: always.
        """
        raise LitZeroError(
            f"{type(self.model).__name__} cannot be copied once it is sharded: a copy has no ranks of its own. Copy it "
            "before setup, or build another one and load the whole weights (full_state_dict, get_module_state_dict)."
        )

    def detach(self) -> None:
        """Give the module back: full parameters on every rank, no hooks. All ranks together."""
        self.join()
        for lane in self.lanes:
            lane.end_residence()  # a step has failed between two micro-batches
        for unit in self.units:
            self._gatherer.need(unit)
            empty(unit, self.exchange)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooks.remove()
        for exchange in {id(each): each for each in (self.exchange, self.everyone, *self.ties.values())}.values():
            exchange.close()
        self.keeping.close()

    def until_detached(self, handle: Handle) -> None:
        """Remove a handle of what else is at work on the module when the module is given back."""
        self._handles.append(handle)

    # ---- forward

    def begin_forward(self, share_buffers: bool = True) -> None:
        """Make the root unit whole; call it before what runs without going through ``model.forward``.

        Args:
            share_buffers: let rank 0's buffers stand for all; all ranks must then call this together.
        """
        if backward_is_running():
            return
        if self._unannounced:  # it has failed: what ends a backward that nobody announced does not come any more
            self._in_backward = self._unannounced = False
        self._gatherer.new_forward()
        self._gatherer.need(self.root)
        if self._keep:
            for binding in self.bindings:
                binding.drop_cleared()
        if share_buffers:
            self.buffers.share()

    # ---- backward

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward of ``loss`` and leave the reduced gradients with the optimizers."""
        self.begin_backward(loss)
        loss.backward()
        self.end_backward()

    def begin_backward(self, loss: torch.Tensor | None = None, continues: bool = False) -> None:
        """Call this right before a backward.

        Args:
            loss: what it starts from. With several optimizers, only what some rank's loss reaches is reduced then.
            continues: it adds to the backward before, which nobody has seen, see :meth:`no_reduce`.
        """
        self.join()
        self._check_passing()
        self._in_backward = True
        self.buffers.ask()
        reached = self._reach.look(loss)
        cleared = [not continues and binding.begin_backward() for binding in self.bindings]
        self._reducer.begin(
            fresh=lambda lane: not continues and (lane.optimizer < 0 or cleared[lane.optimizer]),
            reached=None if reached is None else {lane for lane, found in reached.items() if any(found)},
        )
        for lane, found in (reached or {}).items():
            lane.reached = bytearray(before | now for before, now in zip(lane.reached, found, strict=True))
        self._passing = self.keeping.early
        if self._reducer.unseen:
            self._hooks.sleep()

    def end_backward(self) -> None:
        """Call this right after a backward; returns when the gradients are reduced."""
        self._hooks.wake()
        self._reducer.end()
        self._in_backward = self._passing = False
        if not self._reducer.deferred:
            for lane in self._reducer.lanes:
                if lane.holders in self.ties:
                    lane.sum_over_holders(self.ties[lane.holders])
        for unit in self.units:
            self._gatherer.backward_ends(unit)
            unit.calls = 0
        if self._reducer.unseen:
            self.keeping.settle()
            return
        lanes = self._reducer.lanes
        unreached = set() if self._reducer.deferred else self._reach.unreached(lanes)
        self._attached = []
        for binding in self.bindings:
            if set(lanes).isdisjoint(binding.lanes):
                continue
            if unreached and binding.holds(unreached):
                binding.split()
            self._attached.append((binding, set(lanes) - self._passed, unreached))
            binding.attach(*self._attached[-1][1:])
        self.keeping.settle()
        self._count_gradients()

    @contextlib.contextmanager
    def no_reduce(self, unseen: bool = False) -> Iterator[None]:
        """Inside, a backward is one of several micro-batches of a step and not the last.

        Args:
            unseen: nobody looks at gradients, or clears them, before the next one, which ``continues``: optimizers get
                none, and autograd may add to what is held.
        """
        before, self._reducer.deferred = self._reducer.deferred, True
        self._reducer.unseen = unseen
        try:
            yield
        finally:
            self._reducer.deferred, self._reducer.unseen = before, False
            self._hooks.stay_awake()

    def take(self, param: nn.Parameter) -> None:
        """Take the gradient in ``param.grad``, computed outside of autograd's backward but inside ours."""
        self._hooks.take(param)

    def publish(self) -> None:
        """Hand the gradients of the last backward to the optimizers once more: something has cleared them since.

        Raises:
            LitZeroError: if it has overwritten them.
        """
        for binding, lanes, unreached in self._attached:
            binding.refuse_overwritten()
            binding.attach(lanes, unreached)
        self.keeping.settle()

    def _gradient_comes(self) -> None:
        if not self._in_backward:  # the user called loss.backward() without us
            self.begin_backward()
            self._unannounced = True
            when_over(self._end_unannounced)

    def _end_unannounced(self) -> None:
        self._unannounced = False
        self.end_backward()

    # ---- step

    def step(self) -> None:
        """Step every optimizer. Gradients are dropped with the step that uses them."""
        for binding in self.bindings:
            binding.optimizer.step()

    def _stepped(self, binding: Binding) -> None:
        """The optimizer has changed this rank's masters."""
        if self._keep:
            self.join()  # the step is over: what it has raised is told now
        binding.restore() if self._keep else binding.drop_gradients()
        refuse_lost_changes(self.lanes, self._training)
        for lane in binding.lanes:
            lane.count_step()
        self.refresh(binding.lanes, stepped=True, copied=binding.has_copied)
        if self._keep:  # the same training step may go on to use parameters, and not through a module that we watch
            self._gatherer.need(self.root)

    def refresh(self, lanes: Sequence[Lane] | None = None, stepped: bool = False, copied: bool = False) -> None:
        """Make the masters' present values the parameters: call it after anything has written to the masters. All
        ranks together.

        Args:
            lanes: whose masters; ``None``: all.
            stepped: by the optimizer, which has spread what it has stepped in portions.
            copied: the step has written the 2-byte copies on the device too.
        """
        changed = self.lanes if lanes is None else lanes
        if not stepped:
            self.join()
        for lane in changed:
            if not (copied or (stepped and lane.keeper.walks)):
                lane.publish()
        if self.row.optimizer is Placement.SHARD:
            self._gatherer.invalidate(set(changed))
            self._gatherer.refresh_replicated()

    def settle(self) -> None:
        """Wait for steps and gathers under way; what they have brought counts as old."""
        self.join()
        if self.row.optimizer is Placement.SHARD:
            self._gatherer.invalidate(set(self.lanes))
