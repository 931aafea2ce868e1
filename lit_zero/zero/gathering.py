"""Full parameters: when they are fetched, how long they stay.

[Note: who may overwrite a slot] A released unit stays readable in its slot until another unit needs the slot; so the
unit that ends the forward is still there when the backward begins, and is not fetched again. A slot may be overwritten
unless its holder's forward is running or its backward is: from the first of its outputs to whatever is older than its
forward (``between``). One exception: a checkpointed segment that is recomputed may pass through the slot of a unit
whose backward waits for that very recomputation; the unit's own recomputed forward then brings it back.

[Note: lazy gather] Replicated parameters become stale when the optimizer has updated this rank's part. All units are
then requested at once, in one order, and each is waited for where the next forward needs it: the exchange hides behind
the forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from functools import partial

import torch

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import LitZeroError
from lit_zero.zero.between import moment_of_backward, present_backward, when_over
from lit_zero.zero.lane import Lane
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
        self._backwards: set[int] = set()  # those at whose end their units are let go of

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
        """Note that what runs next does not follow what ran before, and that what a failure has left behind is over."""
        self._last = None
        self._backwards.clear()
        for unit in self._units:
            unit.armed, unit.active = False, 0
            unit.began.clear()

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

    def backward_begins(self, unit: Unit, since: int) -> None:
        """Bring ``unit`` for its backward, after letting go of what the backward has left behind, and request the unit
        that is expected after it.

        Args:
            unit: whose backward begins.
            since: moment at which the forward began that it goes through.

        Raises:
            LitZeroError: if the backward makes a graph of its own and the unit shares its slot.
        """
        if torch.is_grad_enabled():
            self._require_own_slot(unit)
        self.leave_behind()
        backward = present_backward()
        if backward not in self._backwards:
            self._backwards.add(backward)
            when_over(partial(self._backward_is_over, backward))
        if unit.armed and unit.brought == backward:  # it calls itself: its outermost forward counts
            since = min(since, unit.since)
        unit.armed, unit.brought, unit.since = True, backward, since
        self._last = None
        self.need(unit)
        self._prefetch(unit.behind)

    def leave_behind(self) -> None:
        """Let go of the units whose forward is younger than what the present backward has come to."""
        backward, now = present_backward(), moment_of_backward()
        for unit in self._units:
            if unit.armed and unit.brought == backward and unit.since > now:
                self.backward_ends(unit)

    def _backward_is_over(self, backward: int) -> None:
        self._backwards.discard(backward)
        for unit in self._units:
            if unit.armed and unit.brought == backward:
                unit.armed = False
                self.release(unit)

    def _require_own_slot(self, unit: Unit) -> None:
        if unit.slot is not None and unit.slot.units > 1:
            inner = sum(other.sharded and not other.outer for other in self._units)
            raise LitZeroError(
                f"A backward with create_graph=True goes through {unit.title}. Whoever differentiates its result reads "
                f"the unit's parameters again, and by then another unit has taken their slot. Set zero.slots={inner} "
                "(a slot for every unit), or use zero.stage='stage2', where every rank keeps all parameters."
            )

    def release(self, unit: Unit) -> None:
        """Let ``unit``'s slot be overwritten once nothing uses it."""
        if not unit.sharded or unit.active or unit.armed or unit.outer:
            return
        assert unit.slot is not None
        if self._poison and unit.state is Parameters.WHOLE and unit.slot.units > 1:  # else it is there for good
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

    def invalidate(self, lanes: Collection[Lane]) -> None:
        """Note that the shards of ``lanes`` have changed: what was gathered of them is old."""
        self._last = None
        for unit in self._units:
            changed = [lane for lane in unit.lanes if lane in lanes]
            if not changed:
                continue
            self._settle(unit)
            unit.armed, unit.active = False, 0
            unit.stale = changed if unit.state is Parameters.WHOLE else [*{*unit.stale, *changed}]
            unit.state = Parameters.STALE

    def settle(self) -> None:
        """Wait for everything under way; sharded units are in no slot any more, and the slots' memory is given back."""
        for unit in self._units:
            if unit.sharded:
                self._settle(unit)
                unit.state = Parameters.STALE
            else:
                self.need(unit)
        for slot in self.slots:
            self._exchange.give_back(slot.buffer)

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
        lanes = unit.lanes if unit.sharded else [lane for lane in unit.lanes if lane in unit.stale]
        unit.ticket = self._exchange.all_gather([lane.gather() for lane in lanes])
        unit.state = Parameters.COMING

    def _settle(self, unit: Unit) -> None:
        if unit.ticket is not None:  # its buffer belongs to the exchange until then
            unit.ticket.wait()
            unit.ticket = None


def _fill_nan(unit: Unit) -> None:
    for lane in unit.lanes:
        if lane.full is not None and lane.compute_dtype.is_floating_point:
            lane.full.fill_(float("nan"))
