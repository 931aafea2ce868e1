"""From a plan to memory: give parameters their groups, units their lanes, and lanes the parameters' values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import LitZeroError
from lit_zero.precision.policy import Lowering
from lit_zero.zero.lane import Lane, ParamInfo
from lit_zero.zero.materialize import materialize, on_meta
from lit_zero.zero.policy import Placement, Row
from lit_zero.zero.unit import Unit
from lit_zero.zero.units import UnitPlan, cut_evenly


def number_groups(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], infos: dict[str, ParamInfo]
) -> list[tuple[torch.optim.Optimizer, list[list[str]], int]]:
    """Give every parameter the number of its group; return each optimizer with its groups' names and first
    number.
    """
    by_param = {info.param: info for info in infos.values()}
    names_of = {param: name for name, param in model.named_parameters()}
    grouped, first = [], 0
    for optimizer in optimizers:
        names = []
        for number, group in enumerate(optimizer.param_groups):
            foreign = [tuple(p.shape) for p in group["params"] if p not in names_of]
            if foreign:
                raise LitZeroError(
                    f"{type(optimizer).__name__} holds a parameter of shape {foreign[0]} that is not a parameter "
                    "of the module. "
                    "Build optimizers from self.parameters() or self.named_parameters()."
                )
            names.append([names_of[p] for p in group["params"]])
            for param in group["params"]:
                if param in by_param:  # zero-sized parameters have no memory to manage
                    by_param[param].group = first + number
        grouped.append((optimizer, names, first))
        first += len(names)
    return grouped


def build_unit(
    plan: UnitPlan, index: int, row: Row, hold: bool, exchange: Exchange, device: torch.device, lowering: Lowering
) -> Unit:
    """Allocate a unit's lanes: one for each dtype and trainability, large ones cut into parts.

    Args:
        plan: the unit without memory.
        index: its number.
        row: the ZeRO stage, as it is on this many ranks.
        hold: with several micro-batches, sum them locally and reduce once.
        exchange: says which rank this is of how many.
        device: where the memory lies.
        lowering: dtypes of the run.
    """
    kinds: dict[tuple[Any, ...], list[ParamInfo]] = {}
    for info in plan.infos:
        if not info.trainable and row.optimizer is Placement.REPLICATE:
            info.compute_dtype = info.master_dtype  # a second copy would save nothing
        kinds.setdefault((info.trainable, info.compute_dtype, info.master_dtype), []).append(info)
    lanes = [
        Lane(
            sorted(run, key=lambda info: info.group),
            row,
            exchange,
            device,
            lowering.gradient_dtype(run[0].compute_dtype, run[0].master_dtype),
            hold,
        )
        for infos in kinds.values()
        for run in cut_evenly(infos)
    ]
    return Unit(plan.name, index, plan.module, lanes, plan.outer)


def fill_lanes(model: nn.Module, lanes: Sequence[Lane], exchange: Exchange, device: torch.device) -> None:
    """Move every parameter's value into its lane; rank 0's values stand for all.

    Args:
        model: the whole module; what is on the meta device is initialised first.
        lanes: all lanes.
        exchange: the ranks.
        device: where the model computes.
    """
    places = {info.name: (lane, index) for lane in lanes for index, info in enumerate(lane.infos)}
    canonical = {name: info.name for lane in lanes for info in lane.infos for name in (info.name, *info.aliases)}
    meta = on_meta(model)
    for name, (lane, index) in places.items():
        if name not in meta:
            value = lane.infos[index].param.data.to(device).contiguous()
            exchange.broadcast(value)
            lane.store(index, value)

    def sink(name: str, value: torch.Tensor) -> None:
        if name in canonical:
            lane, index = places[canonical[name]]
            lane.store(index, value)

    materialize(model, device, exchange, sink)
    for buffer in model.buffers():
        # Contiguous, since what is sent is received into it: an expanded buffer has no room of its own.
        buffer.data = buffer.data.to(device).contiguous()
        exchange.broadcast(buffer.data)
    for lane in lanes:
        if lane.full is not None:
            lane.seat(lane.full)
        for info in lane.infos:
            info.param.grad = None
