"""Gradients: where they land, in which order they are reduced.

One backward, in phases:

1. A parameter's gradient is complete: autograd's own tensor is copied once into its parcel's landing buffer and
   dropped. Where micro-batches are held that nobody sees in between, as in a pipeline, the view of the buffer then
   stays as the parameter's gradient, and autograd adds the next ones to it by itself, without a call of ours.
2. A parcel's last gradient has landed: the parcel is done.
3. Parcels are reduced in a fixed order, equal on every rank, each as soon as it and all before it are done; the
   exchange runs beside the rest of the backward. With sharded gradients the landing buffer is recycled when its
   reduction is complete.
4. At the end, parcels with parameters that the loss did not reach are reduced with zeros for those, and everything is
   waited for.

[Note: the order of reductions] It must not follow the arrival on one rank, since ranks may run different branches of a
model. It starts as the reverse of registration; after the first backward rank 0's order of completion replaces it, so
that a unit that is always late (a parameter in it is never used) does not hold up the others. Backwards that reach
different parcels (of several optimizers) each have an order of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import torch

from lit_zero.comm.exchange import Exchange, Ticket
from lit_zero.core.errors import LitZeroError
from lit_zero.zero.lane import Lane
from lit_zero.zero.policy import Placement
from lit_zero.zero.unit import Parcel, Unit


class Reducer:
    """Collects gradients and hands them to the exchange.

    Args:
        units: all units, the root first.
        exchange: carries the bytes.
        device: where landing buffers lie.
        landed: called with each lane as its reduction is complete; gradients are dropped there, as far as they can.
    """

    landing_buffers = 2  # one that lands, and one whose reduction is under way

    def __init__(
        self,
        units: Sequence[Unit],
        exchange: Exchange,
        device: torch.device,
        landed: Callable[[Lane], None] | None = None,
    ) -> None:
        self._landed = landed
        self._units, self._exchange, self._device = units, exchange, device
        self._parcels = [parcel for unit in reversed(units) for parcel in reversed(unit.parcels)]
        self._orders: dict[tuple[int, ...], list[Parcel]] = {}  # learned, by the parcels that a backward reaches
        self._reached = tuple(range(len(self._parcels)))  # by the backward that runs
        self._expected = set(self._parcels)  # the same
        self._order = self._parcels
        self._order_learned = exchange.size == 1
        lanes = [lane for parcel in self._parcels for lane in parcel.lanes]
        self._recycles = any(lane.row.gradient is Placement.SHARD for lane in lanes)
        self._holds = any(lane.hold for lane in lanes)
        self._size = max((p.landing_bytes() for p in self._parcels if not p.unit.outer), default=0)
        self._free: dict[int, list[torch.Tensor]] = {}  # by bytes
        # Kept from step to step they cost no page faults; where parameters are sharded, memory is what counts.
        self._keeps = landed is None and all(lane.row.parameter is Placement.REPLICATE for lane in lanes)
        self._lent: dict[Parcel, torch.Tensor] = {}
        self.peak_bytes = 0  # most bytes of landing buffers at one time
        self._flying: deque[tuple[Parcel, Ticket]] = deque()
        self._finished: list[Parcel] = []  # order of completion in the first backward
        self._next = 0
        self.deferred = False  # the coming backward does not reduce: more micro-batches of this step follow
        self.unseen = False  # nobody looks at gradients between it and the next one

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that the present backward reduces, or the last one has reduced."""
        return [lane for parcel in self._order for lane in parcel.lanes]

    def begin(self, fresh: Callable[[Lane], bool], reached: Collection[Lane] | None = None) -> None:
        """Start a backward.

        Args:
            fresh: whether a lane's earlier gradients have been dropped (``zero_grad``); else the new ones are added to
                them.
            reached: lanes that the loss of some rank reaches, the same on every rank; parcels without any keep what
                they have. ``None``: all.
        """
        while self._flying:  # a backward that failed has left them behind
            self._land_oldest()
        chosen = [
            number
            for number, parcel in enumerate(self._parcels)
            if reached is None or any(lane in reached for lane in parcel.lanes)
        ]
        self._reached, self._expected = tuple(chosen), {self._parcels[number] for number in chosen}
        self._order = self._orders.get(self._reached) or [self._parcels[number] for number in chosen]
        self._order_learned = self._exchange.size == 1 or self._reached in self._orders
        self._next = 0
        self._finished = []
        for unit in self._units:
            unit.landed, unit.recomputed, unit.reentrant = 0, -1, False
        for parcel in self._order:
            parcel.done, parcel.landed = False, 0
            parcel.waiting.clear()
            for lane in parcel.lanes:
                lane.begin_backward(fresh(lane))

    def land(self, parcel: Parcel, lane: Lane, index: int, grad: torch.Tensor | None) -> bool:
        """Take in one gradient, ``None`` for one that autograd has added where it lies; return whether it was the
        parcel's last.
        """
        unit = parcel.unit
        if parcel not in self._expected:
            raise LitZeroError(
                f"A gradient of {lane.infos[index].name!r} came, but the loss did not seem to reach it. A reentrant "
                "checkpoint hides what is inside; with several optimizers use torch.utils.checkpoint(..., "
                "use_reentrant=False)."
            )
        if parcel.done:
            raise LitZeroError(
                f"A gradient of {lane.infos[index].name!r} came after it had been reduced in this backward. "
                "A reentrant checkpoint around a module that runs several times does this; use "
                "torch.utils.checkpoint(..., use_reentrant=False)."
            )
        first = not lane.seen[index]
        lane.seen[index] = 1
        parcel.landed += first
        unit.landed += first
        if grad is None:
            pass
        elif self._recycles and unit.outer:
            # An outer unit's first gradients come when activations take most memory, its last ones at the very end: a
            # buffer for the whole would stand empty during the backward.
            parcel.waiting.append((lane, index, grad))
        else:
            self._copy(parcel, lane, index, grad)
        return parcel.landed >= parcel.expected and not (unit.reentrant and unit.calls > 1)

    def complete(self, parcel: Parcel) -> None:
        """Note that all gradients of ``parcel`` have landed and reduce whatever is due."""
        parcel.done = True
        for lane, index, grad in parcel.waiting:
            self._copy(parcel, lane, index, grad)
        parcel.waiting.clear()
        if not self._order_learned:
            self._finished.append(parcel)
        if self.deferred and self._holds:
            return
        while self._next < len(self._order) and self._order[self._next].done:
            self._reduce(self._order[self._next])
            self._next += 1

    def end(self) -> None:
        """Complete what the backward did not, and return when every gradient is where it belongs."""
        for parcel in self._order:
            if not parcel.done:
                self.complete(parcel)
        while self._flying:
            self._land_oldest()
        if not self.unseen:
            for lane in self.lanes:
                lane.end_residence()
        if not self._keeps:
            self.give_back()
        if not self._order_learned and self._order:
            self._learn_order()

    def give_back(self) -> None:
        """Let go of landing buffers that nothing is using."""
        for free in self._free.values():
            while free:
                self._exchange.give_back(free.pop())

    def _learn_order(self) -> None:
        position = {parcel: number for number, parcel in enumerate(self._order)}
        order = torch.tensor([position[p] for p in self._finished], dtype=torch.int64, device=self._device)
        self._exchange.broadcast(order)
        self._orders[self._reached] = [self._order[number] for number in order.tolist()]
        self._order_learned = True

    def _copy(self, parcel: Parcel, lane: Lane, index: int, grad: torch.Tensor) -> None:
        if lane.landing is None:
            parcel.set_landing(self._acquire(parcel))
        # Scaling in the landing copy is free; 2-byte gradients are scaled after the sum, in fp32.
        scale = self._landing_scale(lane)
        lane.land(index, grad, scale)
        if self.unseen and lane.hold and scale == 1.0 and lane.landing_dtype == lane.compute_dtype:
            lane.reside(index)

    def _landing_scale(self, lane: Lane) -> float:
        return 1.0 / self._exchange.size if lane.landing_dtype.itemsize >= 4 else 1.0

    def _reduce(self, parcel: Parcel) -> None:
        lanes = []
        for lane in parcel.lanes:
            if lane.landing is None:
                parcel.set_landing(self._acquire(parcel))
            lane.end_residence()
            lane.fill_missing()
            lanes.append(lane.reduction(1.0 / self._exchange.size / self._landing_scale(lane)))
        self._flying.append((parcel, self._exchange.reduce_scatter(lanes)))
        self._note_peak()

    def _acquire(self, parcel: Parcel) -> torch.Tensor:
        """Return a landing buffer: a free one, a new one while there are few, else that of the oldest reduction."""
        # An outer unit's size is its own, and a held micro-batch stays until the last one: nothing is recycled.
        alone = parcel.unit.outer or (self.deferred and self._holds)
        size = parcel.landing_bytes() if alone else self._size
        free = self._free.setdefault(size, [])
        lent = sum(not p.unit.outer for p in self._lent)
        while not alone and not free and lent >= self.landing_buffers and self._flying:
            self._land_oldest()
        buffer = free.pop() if free else self._exchange.borrow(size, self._device)
        self._lent[parcel] = buffer
        self._note_peak()
        return buffer

    def _note_peak(self) -> None:
        total = sum(size * len(buffers) for size, buffers in self._free.items())
        total += sum(buffer.numel() for buffer in self._lent.values())
        if self._landed is not None:  # what a rank gets of a reduction is no gradient that waits for the step either
            shards = [lane.grad_own for parcel, _ in self._flying for lane in parcel.lanes]
            total += sum(shard.numel() * shard.element_size() for shard in shards if shard is not None)
        self.peak_bytes = max(self.peak_bytes, total)

    def _land_oldest(self) -> None:
        parcel, ticket = self._flying.popleft()
        ticket.wait()
        for lane in parcel.lanes:
            lane.end_reduction()
            if self._landed is not None:
                self._landed(lane)
        if self._recycles:
            parcel.set_landing(None)
            buffer = self._lent.pop(parcel)
            if self._keeps or buffer.numel() == self._size:
                self._free.setdefault(buffer.numel(), []).append(buffer)
            else:
                self._exchange.give_back(buffer)
