"""One unit at run time: its lanes, and whether its parameters are here."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import torch
from torch import nn

from lit_zero.comm.exchange import Ticket
from lit_zero.zero.lane import Lane
from lit_zero.zero.policy import Placement

_SMALL = 1 << 20  # bytes of gradients below which a lane is not worth a message of its own
_SLOT_ALIGN = 64  # bytes; lanes of a slot start on a cache line


class Parameters(enum.Enum):
    """Where a unit's full parameters are.

    With replicated parameters the buffer is always there and ``STALE`` means that other ranks have updated their parts
    of it; with sharded parameters ``STALE`` means that the slot holds another unit, or nothing.
    """

    STALE = "stale"
    COMING = "coming"  # a gather is under way
    WHOLE = "whole"


@dataclass(eq=False)
class Slot:
    """A fixed buffer in which gathered units take turns.

    Attributes:
        buffer: bytes, shape ``[bytes of the largest unit]``.
        holder: the unit whose parameters are in it or on their way.
        units: number of units that take turns in it.
    """

    buffer: torch.Tensor
    holder: Unit | None = None
    units: int = 0


@dataclass(eq=False)
class Parcel:
    """Trainable lanes of a unit and an optimizer whose gradients are reduced together.

    A unit has several, so that reductions start before its backward ends and landing buffers are smaller than units.
    """

    unit: Unit
    lanes: list[Lane]
    landed: int = 0  # parameters whose gradient has come in this backward
    done: bool = False  # its gradients of this backward are complete
    waiting: list[tuple[Lane, int, torch.Tensor]] = field(
        default_factory=list
    )  # gradients that have not been copied yet

    def __post_init__(self) -> None:
        self.expected = sum(len(lane.infos) for lane in self.lanes)

    def landing_bytes(self) -> int:
        """Bytes of the full gradients, as they lie in a landing buffer."""
        return sum(_padded(lane.numel * lane.landing_dtype.itemsize) for lane in self.lanes)

    def set_landing(self, buffer: torch.Tensor | None) -> None:
        """Let the gradients of the coming backward land in ``buffer`` (bytes), or nowhere."""
        if buffer is None:
            for lane in self.lanes:
                lane.set_landing(None)
            return
        for lane, part in _carve(buffer, [(lane, lane.numel, lane.landing_dtype) for lane in self.lanes]):
            lane.set_landing(part)


def _parcelled(lanes: list[Lane]) -> list[list[Lane]]:
    """Give every lane a parcel of its own, except small ones: they join the first of their optimizer, which is usually
    complete last.
    """
    if len({lane.optimizer for lane in lanes}) > 1:
        optimizers = dict.fromkeys(lane.optimizer for lane in lanes)
        return [
            parcel for one in optimizers for parcel in _parcelled([lane for lane in lanes if lane.optimizer == one])
        ]
    large = [lane for lane in lanes if lane.numel * lane.landing_dtype.itemsize >= _SMALL]
    small = [lane for lane in lanes if lane not in large]
    parcels = [[lane] for lane in large]
    if small:
        parcels[:1] = [[*(parcels[0] if parcels else []), *small]]
    return parcels


@dataclass(eq=False)
class Unit:
    """The parameters that travel together.

    Attributes:
        name: module name, ``""`` for the root.
        index: position in order of registration; the root is 0.
        module: the module whose forward the parameters serve.
        lanes: one flat buffer per dtype and trainability.
        outer: contains other units, so it has a slot of its own.
    """

    name: str
    index: int
    module: nn.Module
    lanes: list[Lane]
    outer: bool
    slot: Slot | None = None
    state: Parameters = Parameters.WHOLE
    stale: list[Lane] = field(default_factory=list)  # replicated parameters: lanes that other ranks have updated
    ticket: Ticket | None = None
    active: int = 0  # forwards of the module that are running
    began: list[int] = field(default_factory=list)  # moments at which the forwards that are running began
    armed: bool = False  # its backward is running: the parameters must stay
    brought: int = -1  # the backward for which its parameters were last brought
    since: int = 0  # moment at which the forward began that this backward is going through
    calls: int = 0  # forwards since the last backward
    recomputed: int = -1  # the backward in which a checkpointed forward last ran again
    reentrant: bool = False  # gradients come in backwards inside this one, from each of its calls in turn
    landed: int = 0  # trainable parameters whose gradient has come in this backward
    ahead: Unit | None = None  # the unit that ran next in the last forward
    behind: Unit | None = None  # the unit that ran before in the last forward
    parcels: list[Parcel] = field(default_factory=list)

    def __post_init__(self) -> None:
        trainable = [lane for lane in self.lanes if lane.trainable]
        self.parcels = [Parcel(self, lanes) for lanes in _parcelled(trainable)]
        self.expected = sum(len(lane.infos) for lane in trainable)
        self.sharded = any(lane.row.parameter is Placement.SHARD for lane in self.lanes)
        # A frozen weight may be read after the last gradient of the unit has landed.
        self.has_frozen = len(trainable) < len(self.lanes)

    @property
    def title(self) -> str:
        """The name for messages."""
        return repr(self.name) if self.name else "the root unit"

    def relane(self, lanes: list[Lane]) -> None:
        """Take other lanes; their parameters are whole, or in no slot yet."""
        self.lanes, self.state, self.slot = lanes, Parameters.WHOLE, None
        self.__post_init__()

    def parameter_bytes(self) -> int:
        """Bytes of the full parameters, as they lie in a slot."""
        return sum(_padded(lane.numel * lane.compute_dtype.itemsize) for lane in self.lanes)

    def seat(self, slot: Slot) -> None:
        """Make the parameters views of ``slot``, for good: tensors that a forward saved as views of a weight find it
        again there.
        """
        self.slot = slot
        slot.units += 1
        for lane, part in _carve(slot.buffer, [(lane, lane.numel, lane.compute_dtype) for lane in self.lanes]):
            lane.seat(part)


def _padded(size: int) -> int:
    return -(-size // _SLOT_ALIGN) * _SLOT_ALIGN


def _carve(buffer: torch.Tensor, parts: list[tuple[Lane, int, torch.dtype]]) -> list[tuple[Lane, torch.Tensor]]:
    """Cut a byte buffer into typed parts, one after the other."""
    cut, start = [], 0
    for lane, numel, dtype in parts:
        size = numel * dtype.itemsize
        cut.append((lane, buffer[start : start + size].view(dtype)))
        start += _padded(size)
    return cut
