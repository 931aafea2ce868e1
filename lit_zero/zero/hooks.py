"""What the engine hangs on the user's modules and parameters: what happens around a unit's forward, in its backward,
and when a gradient is complete.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import LitZeroError
from lit_zero.core.nested import tensors_in
from lit_zero.zero.between import backward_is_running, moment, present_backward, when_reached
from lit_zero.zero.calls import Handle, around_forward
from lit_zero.zero.gathering import Gatherer
from lit_zero.zero.lane import Lane
from lit_zero.zero.recurrent import KeptInPlace
from lit_zero.zero.reducing import Reducer
from lit_zero.zero.unit import Parcel, Unit


class Hooks:
    """Brings units when their modules run and lands the gradients of their parameters, until it is removed.

    Args:
        units: all units, the root first; the root has no forward of its own.
        gatherer: brings parameters and lets them go.
        reducer: takes gradients in.
        gradient_comes: called before every gradient: begins the backward that nobody has announced.
    """

    def __init__(
        self, units: Sequence[Unit], gatherer: Gatherer, reducer: Reducer, gradient_comes: Callable[[], None]
    ) -> None:
        self._gatherer, self._reducer, self._gradient_comes = gatherer, reducer, gradient_comes
        self._model = units[0].module
        self._may_sleep = not any(unit.sharded for unit in units)
        self._handles: list[Handle] = [KeptInPlace(self._model)]
        self._lanes = [lane for unit in units for parcel in unit.parcels for lane in parcel.lanes]
        self._landings: list[Callable[[torch.Tensor], None]] = []
        self._asleep: list[bool] = []  # not empty: gradients come unnoticed
        self._takers: dict[nn.Parameter, Callable[[torch.Tensor], None]] = {}
        for number, unit in enumerate(units):
            if number > 0:
                self._hook_forward(unit)
            for parcel in unit.parcels:
                for lane in parcel.lanes:
                    for index, info in enumerate(lane.infos):
                        hook, self._takers[info.param] = self._landing_hooks(parcel, lane, index)
                        self._landings.append(hook)
                        self._handles.append(info.param.register_post_accumulate_grad_hook(_weakly(hook, self._asleep)))

    def sleep(self) -> None:
        """Before a backward whose gradients nobody looks at: let them come unnoticed, if they are added where they lie.
        That is a call of Python less for every parameter.
        """
        if self._may_sleep and all(lane.resident for lane in self._lanes):
            self._asleep.append(True)

    def wake(self) -> None:
        """After it: take notice again, and take what has come to other parameters."""
        if self._asleep:
            self.stay_awake()
            for lane in self._lanes:
                for index, info in enumerate(lane.infos):
                    if info.param.grad is not None and not lane.resides(index, info.param.grad):
                        self._takers[info.param](info.param)

    def stay_awake(self) -> None:
        """Take notice of gradients, whatever has become of the backward."""
        self._asleep.clear()

    def take(self, param: nn.Parameter) -> None:
        """Take the gradient in ``param.grad``, which autograd has not put there; the parameter's unit is here."""
        self._takers[param](param)

    def remove(self) -> None:
        """Take everything off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- forward

    def _hook_forward(self, unit: Unit) -> None:
        after = partial(self._after_forward, unit) if unit.sharded else None
        self._handles += around_forward(unit.module, partial(self._before_forward, unit), after)

    def _before_forward(self, unit: Unit, args: Any, kwargs: Any) -> None:
        if backward_is_running():  # a checkpointed segment runs again, inside the backward
            unit.recomputed = present_backward()
            if unit.sharded:
                self._gatherer.leave_behind()
            self._gatherer.need(unit, recomputing=True)
        else:
            # Without gradient too, as a reentrant checkpoint has it, but not in an evaluation.
            unit.calls += torch.is_grad_enabled() or self._model.training
            if unit.sharded:
                self._gatherer.forward_begins(unit)
            else:
                self._gatherer.need(unit)
        if unit.sharded:
            unit.began.append(moment())

    def _after_forward(self, unit: Unit, args: Any, kwargs: Any, output: Any) -> None:
        since = unit.began.pop()
        if not unit.outer:
            _refuse_parameters(unit, output)
        if torch.is_grad_enabled():
            begins = partial(self._gatherer.backward_begins, unit, since)
            for tensor in tensors_in((output, args, kwargs)):  # the module may have written to, or into, its inputs
                when_reached(tensor, since, begins)
        if backward_is_running():
            self._gatherer.release(unit)
        else:
            self._gatherer.forward_ends(unit)

    # ---- backward

    def _landing_hooks(
        self, parcel: Parcel, lane: Lane, index: int
    ) -> tuple[Callable[[torch.Tensor], None], Callable[[torch.Tensor], None]]:
        """Return what takes a gradient of a parameter in, where autograd brings it and where something else does."""
        unit = parcel.unit

        def landed(param: torch.Tensor) -> None:
            if self._reducer.unseen and not unit.sharded and lane.resides(index, param.grad):
                return  # added where it lies, and not the last of the step
            self._gradient_comes()
            backward = present_backward()
            here = unit.armed or unit.brought == backward  # armed: a part of it may be recomputed in a backward inside
            if unit.sharded and not here and not unit.outer:
                raise LitZeroError(
                    f"The backward of {unit.title} ran while its parameters were not there, so "
                    f"{lane.infos[index].name!r} got a wrong gradient: "
                    "its output reaches the loss through an object that lit_zero cannot look into. Return tensors, "
                    "containers or dataclasses of "
                    "tensors from it, or keep it out of zero.units."
                )
            unit.reentrant |= unit.recomputed not in (-1, backward)
            taken(param)

        def taken(param: torch.Tensor) -> None:
            assert param.grad is not None
            grad = None
            if not lane.resides(index, param.grad):
                grad, param.grad = param.grad.detach(), None  # with create_graph=True it has a graph of its own
                if grad.is_sparse:
                    grad = grad.to_dense()  # it travels in a flat buffer, where rows that nobody looked up are zeros
            if self._reducer.land(parcel, lane, index, grad):
                if unit.landed >= unit.expected and not unit.has_frozen:
                    self._gatherer.backward_ends(unit)
                self._reducer.complete(parcel)

        return landed, taken


def _weakly(hook: Callable[[torch.Tensor], None], asleep: list[bool]) -> Callable[[torch.Tensor], None]:
    """Return a hook that does nothing while ``asleep`` is not empty, and does not keep ``hook`` alive: Python's garbage
    collector does not see what a parameter's hooks hold, so a hook that leads back to its parameter would keep the
    whole model for ever.
    """
    held = weakref.ref(hook)

    def call(param: torch.Tensor) -> None:
        if asleep:
            return
        found = held()
        if found is not None:
            found(param)

    return call


def _refuse_parameters(unit: Unit, output: Any) -> None:
    """Raise if a parameter leaves a unit whose slot is given to another one."""
    names = {id(info.param): info.name for lane in unit.lanes for info in lane.infos}
    for tensor in tensors_in(output):
        name = names.get(id(tensor)) or names.get(id(tensor._base))
        if name is not None:
            raise LitZeroError(
                f"Unit {unit.title} returns its parameter {name!r} or a view of it. Parameters are sharded here, and "
                "the memory behind it goes to another unit now that this one's forward is over. Return a copy "
                "(.clone()), or keep the module out of zero.units."
            )
