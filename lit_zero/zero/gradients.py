"""The gradients of a lane: where they land, and where they wait for the step.

[Note: gradients whose master lives elsewhere] The step reads them where the master is. Each reduced gradient is sent
there as soon as it is complete, while the backward goes on; where gradients are sharded the device then keeps nothing
of it. Further micro-batches are added there.
"""

from __future__ import annotations

import torch

from lit_zero.comm.exchange import Exchange, Reduce
from lit_zero.core.keeping import Keeper
from lit_zero.core.layout import FlatLayout
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.policy import Placement, Row


class Gradients:
    """What a lane does with gradients.

    Attributes:
        infos: the parameters.
        row: the ZeRO stage.
        layout: where the parameters lie in the lane.
        keeper: where the master lives, and with it the gradients that wait for the step.
        hold: with several micro-batches, sum them locally and reduce once.
    """

    infos: list[ParamInfo]
    row: Row
    layout: FlatLayout
    keeper: Keeper
    device: torch.device
    hold: bool
    trainable: bool
    compute_dtype: torch.dtype
    master_dtype: torch.dtype
    start: int
    end: int
    numel: int
    shard_numel: int

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return each parameter's view of a flat buffer of shape ``[P]``."""
        raise NotImplementedError

    def _begin_gradients(self, exchange: Exchange, gradient_dtype: torch.dtype) -> None:
        """Make room for gradients.

        Args:
            exchange: gives the memory that ranks exchange.
            gradient_dtype: dtype in which gradients wait for the step.
        """
        self._gaps = _gaps(self.layout)
        self.gradient_dtype = gradient_dtype
        self.handed_dtype = self.keeper.gradient_dtype(gradient_dtype, self.master_dtype)  # to the optimizer
        self.landing_dtype = gradient_dtype if self.hold else self.compute_dtype
        self.grad_full: torch.Tensor | None = None  # [P]
        self.grad_own: torch.Tensor | None = None  # [P/N]
        self.landing: torch.Tensor | None = None  # [P], where gradients of this backward are written
        self.landing_views: list[torch.Tensor] = []
        self.filled = bytearray(len(self.infos))  # which parameters have content in ``landing``
        self.seen = bytearray(len(self.infos))  # which parameters have landed in this backward
        self.reached = bytearray(len(self.infos))  # which parameters have landed since gradients were dropped
        self.resident: list[ParamInfo] = []  # those to whose gradients autograd adds where they have landed
        self.accumulated = False  # ``grad_own`` holds reduced gradients that were not dropped
        self._carry: torch.Tensor | None = None  # reduced gradients set aside while new ones land in their place
        self._arriving: torch.Tensor | None = None  # [P/N], on the device until it is sent to where the master is
        if self.trainable:
            self._allocate_gradients(exchange)

    def _allocate_gradients(self, exchange: Exchange) -> None:
        if self.row.gradient is Placement.REPLICATE:
            self.landing_dtype = self.gradient_dtype
            self.grad_full = exchange.zeros(self.numel, self.gradient_dtype, self.device)
            self.set_landing(self.grad_full)
            if self.hold:
                self.grad_own = self.grad_full[self.start : self.end]

    def set_landing(self, buffer: torch.Tensor | None) -> None:
        """Let gradients of the coming backward land in ``buffer`` (shape ``[P]``, landing dtype)."""
        self.landing = buffer
        self.landing_views = [] if buffer is None else self.views(buffer)
        if buffer is not None:
            self._zero_gaps(buffer)  # a recycled buffer holds another unit's numbers; padding must stay zero

    def _zero_gaps(self, buffer: torch.Tensor) -> None:
        for first, last in self._gaps:
            buffer[first:last].zero_()

    def begin_backward(self, fresh: bool) -> None:
        """Prepare for a backward; ``fresh``: earlier gradients have been dropped, else the new ones are added to
        them.
        """
        self.seen = bytearray(len(self.infos))
        if fresh:
            self.accumulated = False
            self.end_residence()
            self.filled, self.reached = bytearray(len(self.infos)), bytearray(len(self.infos))
            if self.grad_full is not None:
                self._zero_gaps(self.grad_full)  # clipping by a norm that is NaN has reached them too
        elif self.accumulated and self._in_place:
            self._carry = self._stored_grad().clone()
            self.accumulated = False

    def end_reduction(self) -> None:
        """Note that the reduction is complete."""
        if self._arriving is not None:
            arrived, self._arriving = self._arriving, None
            if self.grad_own is None:
                self.grad_own = self.keeper.gradient(arrived)
            else:
                self.grad_own.add_(arrived.to(self.grad_own.device))
        if self._carry is not None:
            self._stored_grad().add_(self._carry)
            self._carry = None

    @property
    def _in_place(self) -> bool:
        return self.grad_full is not None and self.hold

    @property
    def waiting_bytes(self) -> int:
        """Bytes that an element's gradient takes where the master is until the step, in memory of its own."""
        stepped = self.handed_dtype.itemsize if self.handed_dtype != self.gradient_dtype else 0
        if self._in_place:  # a part of the full gradient, of which a GPU's host has a copy
            return self.master_dtype.itemsize if self.keeper.streams else stepped
        return self.gradient_dtype.itemsize + stepped

    def land(self, index: int, grad: torch.Tensor, scale: float) -> None:
        """Write (the first time) or add gradient ``index`` to the landing buffer, times ``scale``."""
        view = self.landing_views[index]
        if self.filled[index]:
            view.add_(grad, alpha=scale)
        elif scale != 1.0 and grad.dtype == view.dtype:
            torch.mul(grad, scale, out=view)
        else:
            view.copy_(grad)
            if scale != 1.0:
                view.mul_(scale)
        self.filled[index] = self.reached[index] = 1

    def reside(self, index: int) -> None:
        """Let autograd add the next gradients of parameter ``index`` to what has landed, where it lies: its gradient
        is that view until :meth:`end_residence`. The parameter must have the landing buffer's dtype.
        """
        info = self.infos[index]
        info.param.grad = self.landing_views[index]
        self.resident.append(info)

    def resides(self, index: int, grad: torch.Tensor | None) -> bool:
        """Return whether ``grad`` is what has landed of parameter ``index``, where it lies."""
        return grad is not None and bool(self.landing_views) and grad is self.landing_views[index]

    def end_residence(self) -> None:
        """Let parameters have no gradients of their own any more."""
        for info in self.resident:
            info.param.grad = None
        self.resident.clear()

    def fill_missing(self) -> None:
        """Zero the gradients that have not landed: they count as zero in the sum over ranks."""
        for index, view in enumerate(self.landing_views):
            if not self.filled[index]:
                view.zero_()

    def reduction(self, scale: float) -> Reduce:
        """Describe the exchange that turns the landing buffer into this rank's gradient."""
        assert self.landing is not None
        if self.keeper.streams and not self._in_place:
            if not self.accumulated:
                self.grad_own = None
            self._arriving, self.accumulated = (
                torch.empty(self.shard_numel, dtype=self.gradient_dtype, device=self.device),
                True,
            )
            self.filled = bytearray(len(self.infos))
            return Reduce(self.landing, self._arriving, scale)
        if self._lands_whole:
            self.grad_full, self.accumulated = self.landing, True
            self.filled = bytearray(len(self.infos))
            return Reduce(self.landing, self.landing[self.start : self.end], scale, whole=True)
        if self.grad_own is None:
            self.grad_own = torch.empty(self.shard_numel, dtype=self.gradient_dtype, device=self.device)
            self.accumulated = False
        accumulate, self.accumulated = self.accumulated, True
        self.filled = bytearray(len(self.infos))
        return Reduce(self.landing, self.grad_own, scale, accumulate, whole=self.row.optimizer is Placement.REPLICATE)

    def drop_gradients(self) -> None:
        """Let go of the reduced gradients: the step has used them, and the next forward needs the memory more."""
        if self._lands_whole:
            self.grad_full = None
        elif not self._in_place:
            self.grad_own = None
        self.accumulated = False

    @property
    def _lands_whole(self) -> bool:
        """Whether each rank steps with whole gradients, in the buffers where they land [Note: the step inside the
        backward].
        """
        return self.row.gradient is Placement.SHARD and self.row.optimizer is Placement.REPLICATE

    def hold_gradient(self) -> None:
        """Keep a gradient whose landing buffer is about to be used for another."""
        if self._lands_whole and self.grad_full is not None:
            self.grad_full = self.grad_full.clone()

    def sum_over_holders(self, exchange: Exchange) -> None:
        """Add the reduced gradients of all ranks of a pipeline that hold these parameters; what one of them has
        reached, all have.
        """
        grad = self._stored_grad()
        grad.copy_(exchange.sum_in_rank_order(grad.to(self.device)))
        reached = torch.tensor(list(self.reached), dtype=torch.uint8, device=self.device)
        self.reached = bytearray(exchange.maximum(reached).tolist())

    def master_grad(self) -> torch.Tensor:
        """Return the gradient that belongs to ``master``: same shape, same device, in ``handed_dtype``; a view where
        the stored one allows.
        """
        if self.row.optimizer is not Placement.REPLICATE and self.grad_own is None:
            # Held micro-batches wait in the landing buffer: a gradient of no memory stands for them until they are
            # reduced.
            place = "cpu" if self.keeper.away else self.device
            return torch.zeros((), dtype=self.handed_dtype, device=place).expand(self.shard_numel)
        grad = self._stored_grad().to(self.handed_dtype)
        return self.keeper.gradient(grad) if self.keeper.streams and grad.device == self.device else grad

    def overwrite_gradient(self, first: int, last: int, value: torch.Tensor) -> None:
        """Replace the reduced gradient of elements ``[first, last)`` of the master."""
        self._stored_grad()[first:last].copy_(value.view(-1))

    def _stored_grad(self) -> torch.Tensor:
        grad = self.grad_full if self.row.optimizer is Placement.REPLICATE else self.grad_own
        assert grad is not None
        return grad


def _gaps(layout: FlatLayout) -> list[tuple[int, int]]:
    """Return the ranges of the flat buffer that belong to no parameter, in elements."""
    gaps, end = [], 0
    for entry in layout.entries:
        if entry.offset > end:
            gaps.append((end, entry.offset))
        end = entry.end
    if layout.numel > end:
        gaps.append((end, layout.numel))
    return gaps
