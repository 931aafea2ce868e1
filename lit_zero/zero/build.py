"""From a plan to memory: give parameters their groups, units their lanes, and lanes the parameters' values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange, Gather
from lit_zero.core.errors import LitZeroError, UnsupportedError
from lit_zero.core.holding import Holding
from lit_zero.core.keeping import Keeping
from lit_zero.precision.policy import Lowering
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.lane import Lane
from lit_zero.zero.materialize import is_empty, materialize, on_meta
from lit_zero.zero.policy import Placement, Row
from lit_zero.zero.unit import Parameters, Unit
from lit_zero.zero.units import cut_evenly


def group_names(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[list[list[str]]]:
    """Return the names of the parameters in every group of every optimizer."""
    names_of = {param: name for name, param in model.named_parameters()}
    found = []
    for optimizer in optimizers:
        names = []
        for group in optimizer.param_groups:
            foreign = [tuple(p.shape) for p in group["params"] if p not in names_of]
            if foreign:
                raise LitZeroError(
                    f"{type(optimizer).__name__} holds a parameter of shape {foreign[0]} that is not a parameter "
                    "of the module. "
                    "Build optimizers from self.parameters() or self.named_parameters()."
                )
            names.append([names_of[p] for p in group["params"]])
        found.append(names)
    return found


def number_groups(infos: Sequence[ParamInfo], names: Sequence[Sequence[Sequence[str]]]) -> list[ParamInfo]:
    """Give every parameter the numbers of its optimizer and of its group; return those for which they are new.

    Args:
        infos: all parameters.
        names: of the parameters in every group of every optimizer.
    """
    places: dict[str, tuple[int, int]] = {}
    for position, groups in enumerate(names):
        for number, members in enumerate(groups):
            for name in members:
                if name in places:
                    raise UnsupportedError(
                        f"Parameter {name!r} is in two optimizers or groups; lit_zero trains every parameter with one. "
                        "Give each parameters of its own."
                    )
                places[name] = position, number
    changed = []
    for info in infos:  # zero-sized parameters are in groups and not here: they have no memory to manage
        optimizer, group = places.get(info.name, (-1, -1))
        if (optimizer, group) != (info.optimizer, info.group):
            info.optimizer, info.group = optimizer, group
            changed.append(info)
    return changed


def build_lanes(
    infos: Sequence[ParamInfo],
    row: Row,
    hold: bool,
    exchange: Exchange,
    device: torch.device,
    lowering: Lowering,
    holding: Holding,
    keeping: Keeping,
) -> list[Lane]:
    """Allocate lanes for those parameters of one unit that are held here: one for each dtype, trainability, optimizer
    and set of holders, large ones cut into parts.

    Args:
        infos: the parameters.
        row: the ZeRO stage, as it is on this many ranks.
        hold: with several micro-batches, sum them locally and reduce once.
        exchange: says which rank this is of how many.
        device: where the memory lies.
        lowering: dtypes of the run.
        holding: which ranks of a pipeline hold what.
        keeping: where masters live.
    """
    kinds: dict[tuple[Any, ...], list[ParamInfo]] = {}
    for info in infos:
        if not holding.here(info.holders):
            continue
        kept = not info.trainable and row.optimizer is Placement.REPLICATE  # a second copy would save nothing
        info.compute_dtype = info.master_dtype if kept else info.lowered_dtype
        kind = (info.trainable, info.compute_dtype, info.master_dtype, info.optimizer, info.holders)
        kinds.setdefault(kind, []).append(info)
    return [
        Lane(
            sorted(run, key=lambda info: info.group),
            row,
            exchange,
            device,
            lowering.gradient_dtype(run[0].compute_dtype, run[0].master_dtype),
            hold,
            holding.counts(run[0].holders),
            keeping,
        )
        for alike in kinds.values()
        for run in cut_evenly(alike)
    ]


def fill_lanes(
    model: nn.Module,
    lanes: Sequence[Lane],
    absent: Sequence[ParamInfo],
    exchange: Exchange,
    ties: Mapping[tuple[int, ...], Exchange],
    device: torch.device,
) -> None:
    """Move every parameter's value into its lane; rank 0's values stand for all.

    Args:
        model: the whole module; what is on the meta device is initialised first.
        lanes: all lanes.
        absent: parameters that other ranks of a pipeline hold; they keep their shape, without memory.
        exchange: the ranks.
        ties: the ranks of a pipeline that hold a parameter together, by their positions.
        device: where the model computes.
    """
    places = {info.name: (lane, index) for lane in lanes for index, info in enumerate(lane.infos)}
    canonical = {name: info.name for lane in lanes for info in lane.infos for name in (info.name, *info.aliases)}
    meta = on_meta(model)
    for name, (lane, index) in places.items():
        if name not in meta and not is_empty(lane.infos[index].param):
            value = lane.infos[index].param.data.to(device).contiguous()
            exchange.broadcast(value)
            if lane.holders in ties:
                ties[lane.holders].broadcast(value)
            lane.store(index, value)

    def sink(name: str, value: torch.Tensor) -> None:
        if name in canonical:
            lane, index = places[canonical[name]]
            lane.store(index, value)

    materialize(model, device, exchange, sink)
    for info in absent:
        nothing = torch.full((), float("nan") if info.compute_dtype.is_floating_point else 0, dtype=info.master_dtype)
        info.param.data = nothing.to(device).expand(info.shape)
        info.param.grad = None
    for buffer in model.buffers():
        # Contiguous, since what is sent is received into it: an expanded buffer has no room of its own.
        buffer.data = buffer.data.to(device).contiguous()
        exchange.broadcast(buffer.data)
    for lane in lanes:
        if lane.full is not None:
            lane.seat(lane.full)
        for info in lane.infos:
            info.param.grad = None


def empty(unit: Unit, exchange: Exchange) -> None:
    """Give the parameters of ``unit``, which are whole now, memory of their own. All ranks together."""
    for lane in unit.lanes:
        if lane.lowered:  # what the module holds is a 2-byte copy: give the masters back, not their rounding
            full = torch.empty(lane.numel, dtype=lane.master_dtype, device=lane.device)
            exchange.all_gather([Gather(full, lane.own_master())]).wait()
            lane.seat(full)
        elif unit.sharded:
            for info in lane.infos:
                info.param.data = info.param.data.clone()
    if unit.sharded:
        unit.state = Parameters.STALE
