"""Parameters that begin to be trained, or change their group, after setup: they move to lanes of their own.

``BaseFinetuning`` and its like freeze parameters before setup, and later set ``requires_grad`` and call
``add_param_group``. What is frozen shares lanes that have no gradients, so the lanes are taken apart: one unit at a
time is gathered, and its parameters go to new lanes. Lanes without a change keep their memory and their optimizer's
state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch

from lit_zero.comm.exchange import Exchange, Gather
from lit_zero.core.errors import UnsupportedError
from lit_zero.zero.binding import Binding
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.lane import Lane
from lit_zero.zero.unit import Unit


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


def refuse_lost_state(changed: Sequence[ParamInfo], lanes: Sequence[Lane], bindings: Sequence[Binding]) -> None:
    """Check that no parameter with an optimizer's state is about to move.

    Raises:
        UnsupportedError: naming it.
    """
    for binding in bindings:
        stepped = {id(segment.lane) for segment in binding.segments if binding.optimizer.state.get(segment.param)}
        for lane in lanes:
            moving = next((info.name for info in lane.infos if info in changed), None)
            if moving is not None and id(lane) in stepped:
                raise UnsupportedError(
                    f"Parameter {moving!r} was moved to another parameter group after the optimizer had stepped with "
                    "it; its state would be lost. Put it into its group in configure_optimizers, and change the "
                    "group's learning rate instead."
                )
