"""Optimizers that are made after the engine, from parameters that it manages already."""

from __future__ import annotations

import dataclasses

import torch

from lit_zero.core.errors import LitZeroError
from lit_zero.zero.build import number_groups
from lit_zero.zero.engine import Engine


def add_optimizer(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    """Point an optimizer's groups at master shards. All ranks together.

    The parameters of a group lie where they lie, not side by side as when the engine is built with the optimizer: the
    optimizer holds more and shorter segments. Results are the same.

    Args:
        engine: of the module whose parameters the optimizer was made with.
        optimizer: the optimizer, before its first step.

    Raises:
        LitZeroError: if it holds parameters that another optimizer holds, or that are not the module's.
        UnsupportedError: if it cannot be sharded.
    """
    infos = {info.name: info for lane in engine.lanes for info in lane.infos}
    names = {info.param: info.name for info in infos.values()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param in names and infos[names[param]].group >= 0:
                raise LitZeroError(
                    f"{type(optimizer).__name__} holds the parameter {names[param]!r}, which another optimizer holds "
                    "already. Give every parameter to one optimizer."
                )
    first = sum(len(binding.group_names) for binding in engine.bindings)
    [(_, groups, _)] = number_groups(engine.model, [optimizer], infos, first)
    for lane in engine.lanes:
        entries = (dataclasses.replace(e, group=i.group) for e, i in zip(lane.layout.entries, lane.infos, strict=True))
        lane.layout = dataclasses.replace(lane.layout, entries=tuple(entries))
    engine.bindings.append(engine.bind(optimizer, groups, first, [lane for lane in engine.lanes if lane.trainable]))
