"""Gradients: where they land, in which order they are reduced.

One backward, in phases:

1. A parameter's gradient is complete: autograd's own tensor is copied once into the unit's landing buffer and dropped.
2. A unit's last gradient has landed: the unit is done.
3. Units are reduced in a fixed order, equal on every rank, each as soon as it and all before it are done; the exchange
   runs beside the rest of the backward. With sharded gradients the landing buffer is recycled when its reduction is
   complete.
4. At the end, units with parameters that the loss did not reach are reduced with zeros for those, and everything is
   waited for.

[Note: the order of reductions] It must not follow the arrival on one rank, since ranks may run different branches of a
model. It starts as the reverse of registration; after the first backward rank 0's order of completion replaces it, so
that a unit that is always late (a parameter in it is never used) does not hold up the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from lit_zero.comm.exchange import Exchange, Ticket
from lit_zero.core.errors import LitZeroError
from lit_zero.zero.lane import Lane
from lit_zero.zero.policy import Placement
from lit_zero.zero.unit import Unit


class Reducer:
    """Collects gradients and hands them to the exchange.

    Args:
        units: all units, the root first.
        exchange: carries the bytes.
        device: where landing buffers lie.
    """

    landing_buffers = 2  # the unit that lands and the one that is being reduced

    def __init__(self, units: Sequence[Unit], exchange: Exchange, device: torch.device) -> None:
        self._exchange, self._device = exchange, device
        self._order = [u for u in reversed(units) if u.expected]
        self._order_learned = exchange.size == 1
        recycled = [u for u in self._order if any(lane.row.gradient is Placement.SHARD for lane in u.trainable)]
        self._recycles = bool(recycled)
        self._holds = any(lane.hold for u in self._order for lane in u.trainable)
        self._size = max((u.landing_bytes() for u in recycled if not u.outer), default=0)
        self._free: list[torch.Tensor] = []
        self._lent: dict[Unit, torch.Tensor] = {}
        self.peak_bytes = 0  # most bytes of landing buffers at one time
        self._flying: deque[tuple[Unit, Ticket]] = deque()
        self._finished: list[Unit] = []  # order of completion in the first backward
        self._next = 0
        self.deferred = False  # the coming backward does not reduce: more micro-batches of this step follow

    def begin(self, fresh: bool) -> None:
        """Start a backward.

        Args:
            fresh: earlier gradients have been dropped (``zero_grad``); else the new ones are added to them.
        """
        self._next = 0
        for unit in self._order:
            unit.done, unit.landed, unit.recomputed, unit.brought = False, 0, False, False
            for lane in unit.trainable:
                lane.begin_backward(fresh)

    def land(self, unit: Unit, lane: Lane, index: int, grad: torch.Tensor) -> bool:
        """Take in one gradient; return whether it was the unit's last."""
        if unit.done:
            raise LitZeroError(
                f"A gradient of {lane.infos[index].name!r} came after {unit.title} had been reduced in this backward. "
                "A reentrant checkpoint around a module that runs several times does this; use "
                "torch.utils.checkpoint(..., use_reentrant=False)."
            )
        if lane.landing is None:
            unit.set_landing(self._acquire(unit))
        first = not lane.seen[index]
        # Scaling in the landing copy is free; 2-byte gradients are scaled after the sum, in fp32.
        lane.land(index, grad, self._landing_scale(lane))
        unit.landed += first
        return unit.landed >= unit.expected and not (unit.recomputed and unit.calls > 1)

    def complete(self, unit: Unit) -> None:
        """Note that all gradients of ``unit`` have landed and reduce whatever is due."""
        unit.done = True
        if not self._order_learned:
            self._finished.append(unit)
        if self.deferred and self._holds:
            return
        while self._next < len(self._order) and self._order[self._next].done:
            self._reduce(self._order[self._next])
            self._next += 1

    def end(self) -> None:
        """Complete the units that the backward did not, and return when every gradient is where it belongs."""
        for unit in self._order:
            if not unit.done:
                self.complete(unit)
        while self._flying:
            self._land_oldest()
        self._free.clear()
        if not self._order_learned:
            self._learn_order()

    def _learn_order(self) -> None:
        position = {unit: number for number, unit in enumerate(self._order)}
        order = torch.tensor([position[u] for u in self._finished], dtype=torch.int64, device=self._device)
        self._exchange.broadcast(order)
        self._order = [self._order[number] for number in order.tolist()]
        self._order_learned = True
        self._finished = []

    def _landing_scale(self, lane: Lane) -> float:
        return 1.0 / self._exchange.size if lane.landing_dtype.itemsize >= 4 else 1.0

    def _reduce(self, unit: Unit) -> None:
        lanes = []
        for lane in unit.trainable:
            if lane.landing is None:
                unit.set_landing(self._acquire(unit))
            lane.fill_missing()
            lanes.append(lane.reduction(1.0 / self._exchange.size / self._landing_scale(lane)))
        ticket = self._exchange.reduce_scatter(lanes)
        self._flying.append((unit, ticket))

    def _acquire(self, unit: Unit) -> torch.Tensor:
        """Return a landing buffer for ``unit``: a free one, a new one while there are few, else the one whose
        reduction is the oldest.
        """
        if unit.outer:  # it lands during the whole backward, and its size is its own
            return self._lend(unit, unit.landing_bytes())
        inner = sum(not u.outer for u in self._lent)
        while not self._free and inner >= self.landing_buffers and self._flying:
            self._land_oldest()
        return self._lend(unit, self._size)

    def _lend(self, unit: Unit, size: int) -> torch.Tensor:
        recycled = self._free and size == self._size and not unit.outer
        buffer = self._free.pop() if recycled else torch.empty(size, dtype=torch.uint8, device=self._device)
        self._lent[unit] = buffer
        self.peak_bytes = max(self.peak_bytes, sum(b.numel() for b in (*self._lent.values(), *self._free)))
        return buffer

    def _land_oldest(self) -> None:
        unit, ticket = self._flying.popleft()
        ticket.wait()
        for lane in unit.trainable:
            lane.end_reduction()
        if self._recycles:
            unit.set_landing(None)
            buffer = self._lent.pop(unit)
            if not unit.outer:
                self._free.append(buffer)
