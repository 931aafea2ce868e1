"""Parameters that begin to be trained, or change their group, after setup: they move to lanes of their own.

``BaseFinetuning`` and its like freeze parameters before setup, and later set ``requires_grad`` and call
``add_param_group``. What is frozen shares lanes that have no gradients, so the lanes are taken apart: one unit at a
time is gathered, and its parameters go to new lanes. Lanes without a change keep their memory and their optimizer's
state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange, Gather
from lit_zero.core.errors import UnsupportedError
from lit_zero.zero.binding import Binding
from lit_zero.zero.build import group_names, number_groups
from lit_zero.zero.contents import Contents
from lit_zero.zero.gathering import Gatherer
from lit_zero.zero.hooks import Hooks
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.lane import Lane
from lit_zero.zero.policy import Row
from lit_zero.zero.probe import is_shaped
from lit_zero.zero.reducing import Reducer
from lit_zero.zero.unit import Unit


class Regrouping(Contents):
    """What an engine does when groups or optimizers come after setup.

    Attributes:
        model: the whole module.
        exchange: the data-parallel ranks.
        everyone: all ranks.
        device: where the model computes.
        row: the ZeRO stage.
    """

    model: nn.Module
    exchange: Exchange
    everyone: Exchange
    device: torch.device
    row: Row
    _training: bool
    _gatherer: Gatherer
    _reducer: Reducer
    _hooks: Hooks
    _build_lanes: Callable[[Sequence[ParamInfo]], list[Lane]]

    def _trainable(self) -> list[Lane]:
        raise NotImplementedError

    def _bind(self, optimizer: torch.optim.Optimizer, number: int, names: list[list[str]], shaped: bool) -> Binding:
        raise NotImplementedError

    def _assemble(self) -> None:
        raise NotImplementedError

    def follow_groups(self) -> None:
        """Take in what has been changed since setup: parameter groups that were added, parameters of a group that want
        a gradient now. All ranks together, before a training step; it does nothing if nothing has changed.

        Raises:
            LitZeroError: for a group that cannot be followed; the message names it.
        """
        infos = self.infos
        thawed = [info for info in infos if info.param.requires_grad and not info.trainable and self._training]
        if not any(binding.foreign() for binding in self.bindings) and not any(i.group >= 0 for i in thawed):
            return
        names_of = {param: name for name, param in self.model.named_parameters()}
        names = [binding.wanted(names_of) for binding in self.bindings]
        changed = number_groups(infos, names)
        refuse_lost_state(changed, infos, self.lanes, self.bindings, self.everyone, self.device)
        for info in thawed:
            info.trainable = info.group >= 0
        self._move([*changed, *thawed])
        for binding, groups in zip(self.bindings, names, strict=True):
            binding.regroup(groups, self._trainable())
        self._check_room()
        self._assemble()

    def add_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Take in an optimizer that was made after the engine, before its first step. All ranks together.

        Raises:
            UnsupportedError: for a parameter that has an optimizer already, or an optimizer that cannot be sharded.
        """
        [groups] = group_names(self.model, [optimizer])
        shaped = is_shaped(optimizer, self.row, self.keeping.knobs)  # which may refuse it: nothing has moved yet
        infos = self.infos
        self._move(number_groups(infos, [*(binding.group_names for binding in self.bindings), groups]))
        self.bindings.append(self._bind(optimizer, len(self.bindings), groups, shaped))
        self._check_room()
        self._assemble()

    def _move(self, changed: Sequence[ParamInfo]) -> None:
        """Give parameters whose group is another now lanes of their own; ``_assemble`` comes next."""
        self.join()
        self._gatherer.settle()
        self._reducer.give_back()
        self._hooks.remove()
        moving = {id(info) for info in changed}
        for unit in self.units:
            move(unit, moving, self._build_lanes, self.exchange)


def move(
    unit: Unit, changed: Collection[int], build: Callable[[Sequence[ParamInfo]], list[Lane]], exchange: Exchange
) -> None:
    """Give the lanes of ``unit`` that hold changed parameters up for new ones. All ranks together.

    Args:
        unit: its parameters are settled, none are on their way.
        changed: ``id`` of the changed ``ParamInfo`` objects.
        build: makes lanes for parameters.
        exchange: the ranks.
    """
    old = [lane for lane in unit.lanes if any(id(info) in changed for info in lane.infos)]
    if not old:
        return
    values: dict[str, torch.Tensor] = {}
    for lane in old:
        full = torch.empty(lane.numel, dtype=lane.master_dtype, device=lane.device)
        exchange.all_gather([Gather(full, lane.own_master())]).wait()
        values.update(zip([info.name for info in lane.infos], lane.views(full), strict=True))
    new = build([info for lane in old for info in lane.infos])
    for lane in new:
        for index, info in enumerate(lane.infos):
            lane.store(index, values.pop(info.name))
        if lane.full is not None:
            lane.seat(lane.full)
        lane.publish()
        lane.note_versions()
    for lane in old:
        lane.give_back(exchange)
    unit.relane([lane for lane in unit.lanes if lane not in old] + new)


def refuse_lost_state(
    changed: Sequence[ParamInfo],
    infos: Sequence[ParamInfo],
    lanes: Sequence[Lane],
    bindings: Sequence[Binding],
    everyone: Exchange,
    device: torch.device,
) -> None:
    """Check that no parameter is about to move whose state an optimizer of some rank holds. All ranks together: one
    that has no share of a parameter has no state of it either, and must not go on alone.

    Raises:
        UnsupportedError: naming it, on every rank.
    """
    moving = {info.name for info in changed}
    lost = set[str]()
    for binding in bindings:
        stepped = {segment.lane for segment in binding.segments if binding.optimizer.state.get(segment.param)}
        for lane in stepped.intersection(lanes):
            lost |= {info.name for info in lane.infos if info.name in moving}
    last = max((number for number, info in enumerate(infos) if info.name in lost), default=-1)
    agreed = int(everyone.maximum(torch.tensor([last], device=device)).item())
    if agreed >= 0:
        raise UnsupportedError(
            f"Parameter {infos[agreed].name!r} was moved to another parameter group after the optimizer had stepped "
            "with it; its state would be lost. Put it into its group in configure_optimizers, and change the group's "
            "learning rate instead."
        )
