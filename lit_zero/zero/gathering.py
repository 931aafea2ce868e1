"""Full parameters: when they are fetched, how long they stay.

[Note: who may overwrite a slot] A released unit stays readable in its slot until another unit needs the slot; so the
unit that ends the forward is still there when the backward begins, and is not fetched again. A slot may be overwritten
unless its holder's forward is running or its backward is. One exception: a checkpointed segment that is recomputed may
pass through the slot of a unit whose backward waits for that very recomputation; the unit's own recomputed forward then
brings it back.

[Note: lazy gather] Replicated parameters become stale when the optimizer has updated this rank's part. All units are
then requested at once, in one order, and each is waited for where the next forward needs it: the exchange hides behind
the forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import LitZeroError
from lit_zero.zero.unit import Parameters, Slot, Unit


class Gatherer:
    """Fetches full parameters and lets them go.

    Args:
        units: all units, the root first.
        exchange: carries the bytes.
        slots: number of shared slots for units with sharded parameters.
        device: where slots lie.
        poison: fill released slots with NaN.
    """

    def __init__(
        self, units: Sequence[Unit], exchange: Exchange, slots: int, device: torch.device, poison: bool
    ) -> None:
        self._units, self._exchange, self._poison = units, exchange, poison
        self.slots = self._make_slots(slots, device)
        for unit in units:
            if unit.sharded:
                unit.state = Parameters.STALE
        for before, after in itertools.pairwise(units):
            before.ahead, after.behind = after, before
        self._last: Unit | None = None  # the unit whose forward began last

    def _make_slots(self, count: int, device: torch.device) -> list[Slot]:
        def slot(size: int) -> Slot:
            return Slot(self._exchange.zeros(size, torch.uint8, device))

        sharded = [u for u in self._units if u.sharded]
        inner = [u for u in sharded if not u.outer]
        largest = max((u.parameter_bytes() for u in inner), default=0)
        shared = [slot(largest) for _ in range(min(count, len(inner)))]
        private = []
        for unit in sharded:
            if unit.outer:
                private.append(slot(unit.parameter_bytes()))
                unit.seat(private[-1])
        for number, unit in enumerate(inner):
            unit.seat(shared[number % len(shared)])
        return shared + private

    def need(self, unit: Unit, recomputing: bool = False) -> None:
        """Return when ``unit``'s full parameters may be read.

        Raises:
            LitZeroError: if two units that must be here together share a slot.
        """
        if unit.state is Parameters.WHOLE:
            return
        if unit.state is Parameters.STALE:
            if unit.sharded:
                self._fetch(unit, recomputing)
            else:
                self.refresh_replicated()
        assert unit.ticket is not None
        unit.ticket.wait()
        unit.ticket, unit.state = None, Parameters.WHOLE

    def refresh_replicated(self) -> None:
        """Request every stale replicated unit, in the one order that all ranks keep."""
        for unit in self._units:
            if unit.state is Parameters.STALE and not unit.sharded:
                self._start(unit)

    def new_forward(self) -> None:
        """Note that what runs next does not follow what ran before."""
        self._last = None

    def forward_begins(self, unit: Unit) -> None:
        """Bring ``unit`` for its forward and request the unit that is expected after it."""
        if unit.sharded and not unit.outer:
            if self._last is not None and self._last is not unit and self._last.ahead is not unit:
                self._last.ahead, unit.behind = unit, self._last
            self._last = unit
        unit.active += 1
        self.need(unit)
        if unit.sharded:
            self._prefetch(unit.ahead)

    def forward_ends(self, unit: Unit) -> None:
        """Let ``unit`` go after its forward."""
        unit.active -= 1
        self.release(unit)

    def backward_begins(self, unit: Unit) -> None:
        """Bring ``unit`` for its backward and request the unit that is expected after it."""
        unit.armed = unit.brought = True
        self._last = None
        self.need(unit)
        self._prefetch(unit.behind)

    def release(self, unit: Unit) -> None:
        """Let ``unit``'s slot be overwritten once nothing uses it."""
        if not unit.sharded or unit.active or unit.armed or unit.outer:
            return
        if self._poison and unit.state is Parameters.WHOLE:
            unit.state = Parameters.STALE
            _fill_nan(unit)

    def backward_ends(self, unit: Unit) -> None:
        """Let ``unit`` go after its backward, and request the one before it if its slot was not free earlier."""
        if unit.armed:
            unit.armed = False
            self.release(unit)
            behind = unit.behind
            self._prefetch(behind)
            if behind is not None and behind.armed:
                self._prefetch(behind.behind)

    def invalidate(self) -> None:
        """Note that the optimizer has changed the shards: what was gathered is old."""
        self._last = None
        for unit in self._units:
            self._settle(unit)
            unit.armed, unit.active = False, 0
            unit.state = Parameters.STALE if unit.lanes else Parameters.WHOLE

    def _prefetch(self, unit: Unit | None) -> None:
        if unit is None or not unit.sharded or unit.state is not Parameters.STALE:
            return
        assert unit.slot is not None
        holder = unit.slot.holder
        if holder is None or holder is unit or not (holder.active or holder.armed or holder.state is Parameters.COMING):
            self._fetch(unit, recomputing=False)

    def _fetch(self, unit: Unit, recomputing: bool) -> None:
        slot = unit.slot
        assert slot is not None
        holder = slot.holder
        if holder is not None and holder is not unit:
            if holder.active or (holder.armed and not recomputing):
                raise LitZeroError(
                    f"Units {holder.title} and {unit.title} are needed at the same time but take turns in one slot. "
                    f"Raise zero.slots (now {sum(not s.holder or not s.holder.outer for s in self.slots)}), or make "
                    "one unit of both with zero.units."
                )
            self._settle(holder)
            holder.state = Parameters.STALE
        slot.holder = unit
        self._start(unit)

    def _start(self, unit: Unit) -> None:
        unit.ticket = self._exchange.all_gather([lane.gather() for lane in unit.lanes])
        unit.state = Parameters.COMING

    def _settle(self, unit: Unit) -> None:
        if unit.ticket is not None:  # its buffer belongs to the exchange until then
            unit.ticket.wait()
            unit.ticket = None


def _fill_nan(unit: Unit) -> None:
    for lane in unit.lanes:
        if lane.full is not None and lane.compute_dtype.is_floating_point:
            lane.full.fill_(float("nan"))
